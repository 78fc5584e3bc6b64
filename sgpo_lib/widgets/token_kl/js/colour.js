// From a value to a class: colours are CSS variables per level, so that a repaint writes class names and no colours.

const LEVELS = 15, SIGNED = 8, UNKNOWN = 1 + LEVELS + 2 * SIGNED, DIFFERS = UNKNOWN + 1, OVER = 64;
const CLASSES = [];
for (const over of [0, OVER]) {
  const more = over ? " over" : "";
  CLASSES[over] = `t${more}`;
  for (let l = 1; l <= LEVELS; l++) CLASSES[over + l] = `t s${l}${more}`;
  for (let l = 1; l <= SIGNED; l++) {
    CLASSES[over + LEVELS + l] = `t n${l}${more}`;
    CLASSES[over + LEVELS + SIGNED + l] = `t p${l}${more}`;
  }
  CLASSES[over + UNKNOWN] = `t unknown${more}`;
  CLASSES[over + DIFFERS] = `t d1${more}`;
}

function levelOf(kind, root, most) {
  // value -> code, index into CLASSES. `root`: square root; `most`: the value with the last level
  const share = (size) => {
    const x = most > 0 ? Math.min(size / most, 1) : 0;
    return root ? Math.sqrt(x) : x;
  };
  if (kind === "agreement") return (v) => (Number.isNaN(v) ? UNKNOWN : v ? 0 : DIFFERS);
  if (kind === "diverging") return (v) => {
    if (Number.isNaN(v)) return UNKNOWN;
    const level = Math.round(share(Math.abs(v)) * SIGNED);
    return level === 0 ? 0 : LEVELS + (v > 0 ? SIGNED : 0) + level;
  };
  return (v) => (Number.isNaN(v) ? UNKNOWN : v > 0 ? Math.round(share(v) * LEVELS) : 0);
}

function largestOf(arrays) {
  // largest finite size among arrays of values, as the end of a scale; 1 where there is none above 0
  let most = 0;
  for (const values of arrays) for (const v of values) {
    const size = Math.abs(v);
    if (size > most && size < Infinity) most = size;
  }
  return most || 1;
}

function darkAround(node) {
  // whether what stands behind a node is dark: the theme that counts, whatever the host is called
  for (let at = node; at; at = at.parentElement ?? at.getRootNode().host) {
    const colour = getComputedStyle(at).backgroundColor, full = colour.startsWith("color(") ? 1 : 255;
    const [r, g, b, a = 1] = (colour.replace("color(srgb", "").match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    if (a > 0.5) return (0.2126 * r + 0.7152 * g + 0.0722 * b) / full < 0.5;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function followTheme(root) {
  // keeps data-theme right while the host changes its own; returns what ends it
  const look = () => { root.dataset.theme = darkAround(root.parentElement ?? root) ? "dark" : "light"; };
  const soon = () => requestAnimationFrame(look);
  const watch = new MutationObserver(soon);
  for (const node of [document.documentElement, document.body])
    watch.observe(node, {attributes: true, attributeFilter: ["class", "style", "data-theme", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind"]});
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", soon);
  document.addEventListener("load", soon, true);  // a theme's style sheet has come
  const placed = new ResizeObserver(look);  // the widget may be drawn before it has its place in the page
  placed.observe(root);
  look();
  return () => { watch.disconnect(); placed.disconnect(); system.removeEventListener("change", soon); document.removeEventListener("load", soon, true); };
}
