// The page's side of the run monitor: the table of runs, controls, panels, numbers. Names and messages are text nodes.

const STATES = {waiting: "waiting", running: "running", done: "done", failed: "failed", stopped: "stopped"};

function control(tag, className, label, ...children) {
  const node = make(tag, className, ...children);
  node.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab's own keys stay out of here
  if (label) node.setAttribute("aria-label", label);
  if (tag === "button") node.type = "button";
  return node;
}

function select(label, options, value, onChange) {
  const node = control("select", "");
  for (const [key, told] of options) {
    const option = make("option", "", told);
    option.value = key;
    node.append(option);
  }
  node.value = String(value);
  node.addEventListener("change", () => onChange(node.value));
  return make("label", "", label, node);
}

function isDark(root) {
  const [r, g, b] = (getComputedStyle(root).backgroundColor.match(/[\d.]+/g) ?? [255, 255, 255]).map(Number);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128;
}

function runLine(status, row, i, view, toggle) {
  const hidden = view.hidden.has(i), name = control("button", "run", "", make("span", `tag ${tone(i)}`, String(i + 1)), status.name);
  name.setAttribute("aria-pressed", String(!hidden));
  name.title = hidden ? "show this run" : "hide this run";
  name.addEventListener("click", () => toggle(i));
  const step = status.step ?? 0, bar = make("span", "track", make("span", "fill"));
  if (status.total) bar.firstChild.style.width = `${Math.min(100, (100 * step) / status.total)}%`;
  const cells = [`${status.step ?? "–"}${status.total === null ? "" : ` of ${status.total}`}`, written(status.pace), clock(status.left),
    written(status.test)];
  const told = make("td", `state ${status.state}`, STATES[status.state] ?? status.state);
  const progress = make("td", "progress", status.total ? bar : null, cells[0]);
  const line = make("tr", hidden ? "off" : "", make("th", "", name), told, progress, ...cells.slice(1).map((c) => make("td", "", c)));
  line.firstChild.setAttribute("scope", "row");
  const notes = status.warnings.map((w) => make("td", "notes warning", make("b", "", "Warning"), `, ${w}.`));
  if (status.note) notes.push(make("td", "notes", status.note));
  for (const note of notes) note.colSpan = cells.length + 2;
  return [line, ...notes.map((note) => make("tr", "", note))];
}

function runTable(state, rows, view, toggle) {
  const heads = ["run", "state", "step", "s per step", "time left", "test accuracy"];
  const head = make("tr", "", ...heads.map((h) => { const c = make("th", "", h); c.setAttribute("scope", "col"); return c; }));
  return make("table", "runs", make("thead", "", head), make("tbody", "", ...state.flatMap((s, i) => runLine(s, rows[i], i, view, toggle))));
}

function numberTable(panels, view) {
  const title = view.step === null ? "Last values" : `Values at step ${view.step}`;
  const corner = make("td", ""), head = make("tr", "", corner, ...view.runs.map(({i}) => make("th", "", view.state[i].name)));
  const lines = panels.map((p) => make("tr", "", make("th", "", p.spec.title), ...view.runs.map(({run}) => {
    const found = valueAt(run, p.spec, view.step);
    const other = found && found.step !== (view.step ?? lastStep(run));
    return make("td", "", found ? written(found.value) + (other ? ` (step ${found.step})` : "") : "–");
  })));
  head.querySelectorAll("th").forEach((c) => c.setAttribute("scope", "col"));
  lines.forEach((l) => l.firstChild.setAttribute("scope", "row"));
  return make("table", "numbers", make("caption", "", title), make("thead", "", head), make("tbody", "", ...lines));
}

function view(model, el) {
  const root = control("div", "sgpo-monitor", model.get("title") || "Run monitor");
  root.setAttribute("role", "group");
  el.append(root);
  const own = {hover: null, hidden: new Set(), numbers: false, frame: 0, states: ""};
  const change = (name, value) => { model.set(name, value); model.save_changes(); };

  const heading = make("div", "heading", model.get("title")), runs = make("div", "table"), grid = make("div", "grid");
  const numbers = make("div", "table"), axis = make("div", "axis"), told = make("div", "told"), news = make("div", "news");
  news.setAttribute("aria-live", "polite");
  const slider = control("input", "", "step whose values are shown");
  slider.type = "range";
  const where = make("output", ""), newest = control("button", "", "", "newest"), more = control("button", "", "", "numbers");
  newest.title = "show the last values (Esc)";
  more.title = "all values as a table";
  const smoothing = [0, 5, 10, 20, 50];
  if (!smoothing.includes(model.get("smoothing"))) smoothing.push(model.get("smoothing"));
  const axes = select("axis", Object.keys(model.get("axes")).map((k) => [k, k]), model.get("x"), (v) => change("x", v));
  const smooth = select("running mean", smoothing.map((k) => [String(k), k ? `${k} steps` : "off"]), model.get("smoothing"),
    (v) => change("smoothing", Number(v)));
  const log = control("input", "");
  log.type = "checkbox";
  log.addEventListener("change", () => change("log_loss", log.checked));
  const bar = make("div", "bar", axes, smooth, make("label", "", log, "log losses"), more, make("span", "spacer"),
    make("label", "step", "step", slider, where), newest);
  root.append(heading, runs, bar, grid, axis, numbers, told, news);
  heading.hidden = !model.get("title");

  let saving = 0;
  const pick = (step) => {
    own.hover = null;
    model.set("selected_step", step);
    clearTimeout(saving);
    saving = setTimeout(() => model.save_changes(), 120);  // a held arrow key is one message, not fifty
    soon();
  };
  const onStep = (find) => {
    const step = find(current());
    if (step !== own.hover) { own.hover = step; point(); }
  };
  const onPick = (find) => {
    const step = find(current());
    pick(step === model.get("selected_step") ? null : step);
  };
  const panels = model.get("panels").map((spec) => makePanel(spec, onStep, onPick));

  function current() {
    const rows = model.get("rows"), state = model.get("state"), [column, xTitle] = model.get("axes")[model.get("x")];
    const shown = rows.map((run, i) => ({run, i})).filter(({i}) => !own.hidden.has(i));
    const xs = shown.flatMap(({run}) => [run.train[column], run.eval[column]].filter((c) => c.length).flatMap((c) => [c[0], c.at(-1)]));
    const low = xs.length ? Math.min(...xs) : 0, high = xs.length ? Math.max(...xs) : 1;
    const room = Math.max(200, root.clientWidth - 20), count = Math.max(1, Math.floor((room + 12) / 292));
    return {runs: shown, numbered: rows.length > 1, step: own.hover ?? model.get("selected_step"), column, xTitle,
      domain: [low, high > low ? high : low + 1], smoothing: model.get("smoothing"), log: model.get("log_loss"),
      width: Math.floor((room - 12 * (count - 1)) / count), state,
      ended: state.every((s) => ["done", "failed", "stopped"].includes(s.state))};
  }

  const present = (view) => {
    const any = (p) => view.runs.some(({run}) => (run[p.spec.table][p.spec.column] ?? []).some((v) => v !== null));
    const begun = view.runs.some(({run}) => run.train.step.length);
    return panels.filter((p) => p.spec.asked || !begun || any(p));
  };

  function draw() {
    own.frame = 0;
    const view = current(), shown = present(view);
    root.classList.toggle("dark", isDark(root));
    log.checked = view.log;
    axes.lastChild.value = model.get("x");
    smooth.lastChild.value = String(view.smoothing);
    const focused = [...runs.querySelectorAll("button")].indexOf(document.activeElement);
    runs.replaceChildren(runTable(view.state, model.get("rows"), own, (i) => {
      if (!own.hidden.delete(i)) own.hidden.add(i);
      soon();
    }));
    if (focused >= 0) runs.querySelectorAll("button")[focused]?.focus();
    const nodes = shown.map((p) => p.node);
    if (nodes.length !== grid.children.length || nodes.some((n, i) => n !== grid.children[i])) grid.replaceChildren(...nodes);
    grid.style.gridTemplateColumns = `repeat(auto-fill, ${view.width}px)`;
    shown.forEach((p) => p.draw(view));
    axis.textContent = `Horizontal axis: ${view.xTitle}.` + (view.smoothing > 1 ? ` Thick: mean of the last ${view.smoothing} training rows; thin: as logged.` : "");
    told.textContent = readable(model.get("told")) || (model.get("following") ? "" : view.ended ? "All runs have ended." : "Not reading on: monitor.start() does.");
    told.classList.toggle("wrong", Boolean(model.get("told")));
    const states = view.state.map((s) => [`${s.name}: ${s.state}`, ...s.warnings.map((w) => `warning, ${w}`)].join(", ")).join("; ");
    if (own.states && own.states !== states) news.textContent = readable(states);
    own.states = states;
    point(view, shown);
  }

  function point(view = current(), shown = present(view)) {
    shown.forEach((p) => p.point(view));
    const steps = view.runs.flatMap(({run}) => [run.train.step, run.eval.step].filter((s) => s.length).flatMap((s) => [s[0], s.at(-1)]));
    slider.disabled = !steps.length;
    slider.min = steps.length ? Math.min(...steps) : 0;
    slider.max = steps.length ? Math.max(...steps) : 1;
    slider.value = view.step ?? slider.max;
    where.textContent = view.step === null ? "last" : String(view.step);
    slider.setAttribute("aria-valuetext", view.step === null ? "last values" : `step ${view.step}`);
    newest.disabled = model.get("selected_step") === null;
    numbers.replaceChildren(...(own.numbers ? [numberTable(shown, view)] : []));
    more.setAttribute("aria-expanded", String(own.numbers));
  }

  const soon = () => { own.frame = own.frame || requestAnimationFrame(draw); };
  slider.addEventListener("input", () => pick(Number(slider.value)));
  newest.addEventListener("click", () => pick(null));
  more.addEventListener("click", () => { own.numbers = !own.numbers; point(); });
  root.addEventListener("keydown", (e) => { if (e.key === "Escape") { e.preventDefault(); pick(null); } });

  const names = ["rows", "state", "following", "told", "selected_step", "x", "smoothing", "log_loss"].map((n) => `change:${n}`);
  names.push("msg:custom");
  names.forEach((name) => model.on(name, soon));
  const sizes = new ResizeObserver(soon), themes = new MutationObserver(soon), scheme = matchMedia("(prefers-color-scheme: dark)");
  sizes.observe(root);
  for (const node of [document.body, document.documentElement]) themes.observe(node, {attributes: true});
  scheme.addEventListener("change", soon);
  draw();
  return () => {
    names.forEach((name) => model.off(name, soon));
    sizes.disconnect();
    themes.disconnect();
    scheme.removeEventListener("change", soon);
    cancelAnimationFrame(own.frame);
    clearTimeout(saving);
  };
}

export default {initialize: ({model}) => receive(model), render: ({model, el}) => view(model, el)};
