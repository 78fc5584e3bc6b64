// Header and blobs (see payload.py) to typed arrays. Everything is little-endian, as the machines are that browsers run on.

let halves = null;

function halfTable() {
  // value of each of the 65,536 half-precision numbers
  if (halves) return halves;
  halves = new Float32Array(65536);
  for (let h = 0; h < 65536; h++) {
    const sign = h & 0x8000 ? -1 : 1, exponent = (h >> 10) & 31, fraction = h & 1023;
    halves[h] = exponent === 0 ? sign * fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return halves;
}

function aligned(blob) {
  // an ArrayBuffer that begins with the blob's first byte, from a DataView, a typed array or an ArrayBuffer
  if (blob instanceof ArrayBuffer) return blob;
  return blob.buffer.slice(blob.byteOffset, blob.byteOffset + blob.byteLength);
}

function column(buffer, [type, offset, count]) {
  if (type === "u1") return new Uint8Array(buffer, offset, count);
  if (type === "u2") return new Uint16Array(buffer, offset, count);
  if (type === "u4") return new Uint32Array(buffer, offset, count);
  if (type === "f4") return new Float32Array(buffer, offset, count);
  const table = halfTable();
  return Float32Array.from(new Uint16Array(buffer, offset, count), (h) => table[h]);
}

function columnsOf(place, blobs) {
  const buffer = aligned(blobs[place.blob]);
  return Object.fromEntries(Object.entries(place.columns).map(([name, at]) => [name, column(buffer, at)]));
}

function decode(header, blobs) {
  // {words: {id, text}, panes}; frames are decoded when they are first looked at
  const words = columnsOf(header.words, blobs);
  words.text = JSON.parse(new TextDecoder().decode(words.text));
  const panes = header.panes.map((told, number) => {
    const {text, piece} = columnsOf(told, blobs);
    const frames = told.frames.map((frame) => {
      let made = null;
      return () => made ?? (made = decodeFrame(frame, columnsOf(frame, blobs)));
    });
    return {...told, number, text, piece: piece ?? text, count: told.tokens, frame: (i) => frames[Math.min(i, frames.length - 1)]()};
  });
  return {title: header.title, metrics: header.metrics, words, panes};
}

function decodeFrame(told, columns) {
  const count = columns.count.length, offset = new Uint32Array(count + 1);
  for (let i = 0; i < count; i++) offset[i + 1] = offset[i] + columns.count[i];
  const {unguided_logp: unguided, guided_logp: guided} = columns;
  const sft_loss = unguided.map((v) => -v), log_ratio = guided.map((v, i) => v - unguided[i]);
  const top1_agree = Float32Array.from(columns.agree, (v) => (v === 2 ? NaN : v));
  let order = null;  // sorted when it is first asked for
  return {...told, ...columns, offset, sft_loss, log_ratio, top1_agree, get order() { return order ??= klOrder(columns.forward_kl); }};
}
