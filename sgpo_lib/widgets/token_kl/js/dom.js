// Small makers of elements on top of `make` (shared/make.js).

function named(node, name) {
  // a control that scripts and tests can find; JupyterLab's shortcuts stay out of it
  node.dataset.control = name;
  node.setAttribute("data-lm-suppress-shortcuts", "true");
  return node;
}

function button(name, text, title, onClick) {
  const node = named(make("button", "", text), name);
  node.type = "button";
  node.title = title;
  node.setAttribute("aria-label", title);
  node.addEventListener("click", onClick);
  return node;
}

function select(name, label, options, value, onChange) {
  const node = named(make("select"), name);
  for (const [key, told] of options) {
    const option = make("option", "", told);
    option.value = key;
    node.append(option);
  }
  node.value = value;
  node.addEventListener("change", () => onChange(node.value));
  return make("label", "", label, node);
}

function input(name, type, label, onInput) {
  const node = named(make("input"), name);
  node.type = type;
  node.setAttribute("aria-label", label);
  node.autocomplete = "off";
  node.spellcheck = false;
  node.addEventListener("input", () => onInput(node.value));
  return node;
}

function throttled(act, gap) {
  // runs act at most once in `gap` ms, and always for the last call
  let timer = null, last = -Infinity;
  const run = () => { timer = null; last = performance.now(); act(); };
  const call = () => {
    if (timer !== null) return;
    const wait = last + gap - performance.now();
    if (wait <= 0) run(); else timer = setTimeout(run, wait);
  };
  call.flush = () => { if (timer !== null) { clearTimeout(timer); run(); } };
  return call;
}

function shown(value, digits = 3) {
  // a number for people; what is not known is a dash, never 0
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === Infinity) return "∞";
  if (value === -Infinity) return "−∞";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 10 ** -digits || size >= 1e6) ? value.toExponential(1) : value.toFixed(digits);
  return text.replaceAll("-", "−");
}

function percent(share) {
  if (share === null || Number.isNaN(share)) return "–";
  const value = 100 * share;
  return `${value.toFixed(value > 0 && value < 1 ? 2 : 1)}%`;
}

function whole(count) {
  return count.toLocaleString("en-US");
}
