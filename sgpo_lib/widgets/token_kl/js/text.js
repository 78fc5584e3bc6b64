// The response as flowing text: one span per token, in blocks that the browser skips while they are out of sight.

const BLOCK_LEAST = 48, BLOCK_SOFT = 400, BLOCK_MOST = 900, CHARS_PER_LINE = 90;

function blockEnds(texts) {
  // where blocks end: at a line's end; in very long lines at a sentence's end, or where it must be
  const ends = [];
  let size = 0;
  for (let i = 0; i < texts.length; i++) {
    size++;
    const line = size >= BLOCK_LEAST && texts[i].endsWith("\n");
    const soft = size >= BLOCK_SOFT && /[.;?!,。，]\s*$/.test(texts[i]);
    if (line || soft || size >= BLOCK_MOST) { ends.push(i + 1); size = 0; }
  }
  if (size) ends.push(texts.length);
  return ends;
}

class TextView {
  // `pane` and `words` as decode() gives them. Flags (focus, brush, step, search hit) are attributes beside the class
  // that holds the colour, so that neither overwrites the other.
  constructor(pane, words) {
    this.pane = pane;
    this.texts = Array.from(pane.text, (w) => words.text[w]);
    this.pieces = Array.from(pane.piece, (w) => words.text[w]);
    this.spans = new Array(pane.count);
    this.codes = new Uint8Array(pane.count);
    this.flags = new Map();
    this.active = 0;
    this.node = make("div", "text");
    this.node.setAttribute("role", "listbox");
    this.node.setAttribute("aria-multiselectable", "true");
    this.node.setAttribute("aria-label", `tokens of ${spoken(pane.label)}`);
    this.node.setAttribute("data-lm-suppress-shortcuts", "true");
    this.node.append(this.build());
    this.roving(0, 0);
  }

  build(spaces = false) {
    // all spans, made anew; `codes` says how each is coloured
    const all = document.createDocumentFragment(), pane = this.pane.number;
    let block = null, start = 0, chars = 0, lines = 0;
    for (const end of blockEnds(this.texts)) {
      block = make("div", "block");
      block.setAttribute("role", "presentation");
      chars = lines = 0;
      for (let i = start; i < end; i++) {
        const span = document.createElement("span");
        span.token = i;
        span.pane = pane;
        span.className = CLASSES[this.codes[i]];
        span.setAttribute("role", "option");
        if (this.texts[i]) write(span, this.texts[i], spaces);
        else span.append(make("i", "code", this.pieces[i] || "·"));
        chars += this.texts[i].length;
        if (this.texts[i].includes("\n")) { lines += Math.ceil(chars / CHARS_PER_LINE); chars = 0; }
        this.spans[i] = span;
        block.append(span);
      }
      const last = this.texts[end - 1].endsWith("\n") || end === this.texts.length;
      if (!last) block.classList.add("cut");
      block.style.containIntrinsicBlockSize = `auto ${1.95 * (lines + Math.ceil(chars / CHARS_PER_LINE) || 1)}em`;
      all.append(block);
      start = end;
    }
    return all;
  }

  rewrite(spaces) {
    // the same tokens with or without visible spaces
    const top = this.node.scrollTop, flags = [...this.flags];
    this.node.replaceChildren(this.build(spaces));
    for (const [name, tokens] of flags) for (const i of tokens) this.mark(i, name, true);
    this.roving(this.active, this.active);
    this.node.scrollTop = top;
  }

  paint(values, level, frame, delta) {
    // colour every token anew; only spans whose code changes are touched
    const kl = frame.forward_kl, {spans, codes} = this;
    for (let i = 0; i < spans.length; i++) {
      const code = level(values[i]) + (kl[i] > delta ? OVER : 0);
      if (code !== codes[i]) { codes[i] = code; spans[i].className = CLASSES[code]; }
    }
  }

  shift(frame, before, after) {
    // delta moved: touch only the tokens between the two
    const {order, kept} = frame.order, a = kept(before), b = kept(after);
    for (let r = Math.min(a, b); r < Math.max(a, b); r++) {
      const i = order[r];
      this.codes[i] ^= OVER;
      this.spans[i].className = CLASSES[this.codes[i]];
    }
  }

  flag(name, tokens) {
    // give an attribute to these tokens and take it from all others
    const before = this.flags.get(name) ?? new Set(), after = new Set(tokens);
    for (const i of before) if (!after.has(i)) this.mark(i, name, false);
    for (const i of after) if (!before.has(i)) this.mark(i, name, true);
    this.flags.set(name, after);
  }

  mark(i, name, on) {
    const span = this.spans[i];
    if (on) span.setAttribute(name, ""); else span.removeAttribute(name);
    if (name === "data-selected") span.setAttribute("aria-selected", String(on));
  }

  roving(from, to) {
    // one tab stop among all tokens
    const old = this.spans[from], now = this.spans[to];
    old.removeAttribute("tabindex");
    now.tabIndex = 0;
    now.setAttribute("data-lm-suppress-shortcuts", "true");
    this.active = to;
  }

  focus(i) {
    this.roving(this.active, i);
    this.reveal(i);
    this.spans[i].focus({preventScroll: true});
  }

  reveal(i) {
    // scroll the text, and only it, until the token is in sight; blocks that come into sight may change their height
    const look = () => {
      const box = this.node.getBoundingClientRect(), spot = this.spans[i].getBoundingClientRect();
      const above = spot.top - box.top, below = spot.bottom - box.bottom;
      if (above < 24 || below > -24) this.node.scrollTop += above - Math.min(box.height / 3, 160);
    };
    look();
    requestAnimationFrame(look);
  }

  beside(i, lines) {
    // the token above (-1) or below (1) token i, at about the same place in its line
    const box = this.spans[i].getBoundingClientRect(), x = box.left + box.width / 2;
    let best = i, gap = Infinity, row = null;
    for (let k = i + lines; k >= 0 && k < this.spans.length && Math.abs(k - i) < 2000; k += lines) {
      const at = this.spans[k].getBoundingClientRect();
      if (lines * (at.top - box.top) < box.height / 2 || !at.width) continue;
      row ??= at.top;
      if (Math.abs(at.top - row) > box.height / 2) break;
      const distance = Math.abs(at.left + at.width / 2 - x);
      if (distance < gap) { gap = distance; best = k; }
    }
    return best;
  }
}
