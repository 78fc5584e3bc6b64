// Search in the text of the shown responses, across tokens.

const HITS_MOST = 5000;

function hitsOf(view, words) {
  // token ranges [first, last] where the words stand; capitals count only where the words have some
  if (!words) return [];
  view.whole ??= view.texts.join("");
  if (!view.begins) {
    view.begins = new Uint32Array(view.texts.length);
    for (let i = 1; i < view.texts.length; i++) view.begins[i] = view.begins[i - 1] + view.texts[i - 1].length;
  }
  const tokenAt = (at) => {
    let low = 0, high = view.begins.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (view.begins[middle] <= at) low = middle; else high = middle - 1;
    }
    return low;
  };
  const expression = new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), words === words.toLowerCase() ? "gi" : "g");
  const found = [];
  for (const m of view.whole.matchAll(expression)) {
    found.push([tokenAt(m.index), tokenAt(m.index + m[0].length - 1)]);
    if (found.length >= HITS_MOST) break;
  }
  return found;
}

function range(first, end) {
  return Array.from({length: Math.max(0, end - first)}, (_, k) => first + k);
}
