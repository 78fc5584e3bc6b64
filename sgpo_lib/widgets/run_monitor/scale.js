// Axes and numbers.

function range(values, {share = false, log = false} = {}) {
  // [low, high] that shows all values; from 0 where they reach near it
  const kept = values.filter((v) => v !== null && (!log || v > 0));
  if (share) return [0, 1];
  if (!kept.length) return log ? [0.1, 1] : [0, 1];
  let low = kept[0], high = kept[0];
  for (const v of kept) { if (v < low) low = v; if (v > high) high = v; }
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  if (low >= 0 && low < high / 2) low = 0;
  if (low === high) { const half = Math.abs(low) / 10 || 1; return [low === 0 ? 0 : low - half, high + half]; }
  const margin = (high - low) * 0.06;
  return [low === 0 ? 0 : low - margin, high + margin];
}

function ticks(low, high, count, log = false) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    const inside = all.filter((v) => v >= low && v <= high);
    const decades = inside.filter((v) => /^1(e|$)/.test(v.toExponential().replace(".0", "")));
    const some = decades.length >= 2 ? decades : inside;
    const every = Math.ceil(some.length / (count + 1));
    return some.filter((_, i) => i % every === 0);
  }
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw * 0.999));
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) out.push(Number((k * step).toPrecision(12)));
  return out;
}

function position(value, [low, high], from, to, log = false) {
  const at = log ? (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low)) : (value - low) / (high - low);
  return from + at * (to - from);
}

function written(value) {
  // three significant digits, thousands as k
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 999.5e3) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 9999.5) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size >= 999.5) return String(Math.round(value));
  if (size > 0 && size < 0.001) return value.toExponential(1).replace(".0e", "e").replaceAll("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

function clock(seconds) {
  // mm:ss, from an hour on h:mm:ss, a dash for null
  if (seconds === null || seconds === undefined) return "–";
  const two = (n) => String(n).padStart(2, "0"), minutes = Math.floor(seconds / 60);
  const rest = two(seconds % 60);
  return minutes < 60 ? `${two(minutes)}:${rest}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${rest}`;
}
