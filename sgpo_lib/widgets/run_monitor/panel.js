// One panel: a metric of all runs over the shared axis.

const HEIGHT = 148, LEFT = 42, TOP = 8, BOTTOM = 20, LIMIT = 2000;

function drawn(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const tone = (i) => `tone-${i % 8}`;  // a colour of styles.css

function path(points) {
  // points: [x, y] or null for a gap
  let out = "", open = false;
  for (const p of points) {
    if (p) out += `${open ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`;
    open = Boolean(p);
  }
  return out;
}

function spread(labels, gap, low, high) {
  // moves labels {x, y} apart in y, within [low, high], where one would cover another
  const placed = [];
  const near = (l) => placed.filter((p) => Math.abs(p.x - l.x) < 14);
  const free = (l, y) => y >= low && y <= high && near(l).every((p) => Math.abs(p.y - y) >= gap);
  for (const l of labels.sort((a, b) => a.y - b.y)) {
    const places = [l.y, ...near(l).flatMap((p) => [p.y + gap, p.y - gap])].filter((y) => free(l, y));
    if (places.length) l.y = places.reduce((a, b) => (Math.abs(b - l.y) < Math.abs(a - l.y) ? b : a));
    placed.push(l);
  }
}

function makePanel(spec, onStep, onPick) {
  // `draw(view)` draws all, `point(view)` only what follows the pointer. view: runs [{run, i}], numbered, step,
  // domain, column, xTitle, smoothing, log, width, ended
  const values = make("div", "values"), note = make("div", "note");
  const svg = drawn("svg", {role: "img"}), node = make("div", "panel", make("div", "name", spec.title), values, svg, note);
  const cursor = drawn("g", {class: "cursor"});
  node.firstChild.title = spec.title;  // where it is cut
  let place = null;

  // evaluations are too few for a running mean
  const smoothed = (view) => view.smoothing > 1 && spec.table === "train";

  function scales(view) {
    const log = view.log && spec.loss, right = view.width - (view.numbered ? 16 : 8);
    const shown = view.runs.map(({run, i}) => {
      const raw = run[spec.table][spec.column] ?? [], xs = run[spec.table][view.column];
      return {i, run, xs, raw, ys: runningMean(raw, smoothed(view) ? view.smoothing : 0)};
    });
    const few = shown.every((c) => c.raw.length <= 30);
    const all = shown.flatMap((c) => c.raw), y = range(all, {share: spec.share, log});
    const ok = (v) => v !== null && (!log || v > 0);
    const X = (v) => position(v, view.domain, LEFT, right), Y = (v) => position(v, y, HEIGHT - BOTTOM, TOP, log);
    return {shown, few, all, y, log, right, ok, X, Y};
  }

  function axes({y, log, right, X, Y}, view) {
    const out = [];
    for (const v of ticks(...y, 5, log)) {
      out.push(drawn("line", {class: "grid", x1: LEFT, x2: right, y1: Y(v), y2: Y(v)}));
      out.push(drawn("text", {x: LEFT - 5, y: Y(v) + 3.5, "text-anchor": "end"}, written(v)));
    }
    for (const v of ticks(...view.domain, Math.max(2, Math.floor((right - LEFT) / 60)))) {
      out.push(drawn("line", {class: "tick", x1: X(v), x2: X(v), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 3}));
      out.push(drawn("text", {x: X(v), y: HEIGHT - 5, "text-anchor": "middle"}, written(v)));
    }
    out.push(drawn("line", {class: "base", x1: LEFT, x2: right, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM}));
    return out;
  }

  function curve(c, {few, ok, X, Y, right}, faint) {
    const ys = faint ? c.raw : c.ys, limit = Math.min(LIMIT, Math.max(50, Math.round(2 * (right - LEFT))));
    const kept = thin(ys, limit), at = kept.map((i) => (ok(ys[i]) ? [X(c.xs[i]), Y(ys[i])] : null));
    const out = [drawn("path", {class: `curve ${tone(c.i)}${faint ? " faint" : ""}`, d: path(at)})];
    const real = at.filter(Boolean);
    const dots = faint ? [] : few ? real : at.filter((p, k) => p && !at[k - 1] && !at[k + 1]);
    for (const [cx, cy] of dots) out.push(drawn("circle", {class: `dot ${tone(c.i)}`, cx: cx.toFixed(1), cy: cy.toFixed(1), r: 1.8}));
    return {out, end: real.at(-1)};
  }

  function draw(view) {
    const s = place = scales(view), parts = axes(s, view), labels = [];
    svg.setAttribute("viewBox", `0 0 ${view.width} ${HEIGHT}`);
    svg.setAttribute("width", view.width);
    svg.setAttribute("height", HEIGHT);
    for (const c of smoothed(view) ? s.shown : []) parts.push(...curve(c, s, true).out);
    for (const c of s.shown) {
      const {out, end} = curve(c, s, false);
      parts.push(...out);
      if (end && view.numbered) labels.push({i: c.i, x: end[0], y: end[1]});
    }
    spread(labels, 9, TOP, HEIGHT - BOTTOM);
    for (const l of labels) parts.push(drawn("text", {class: `number ${tone(l.i)}`, x: l.x + 5, y: l.y + 3.5}, String(l.i + 1)));
    svg.replaceChildren(...parts, cursor);
    const has = s.all.some((v) => v !== null);
    const hidden = s.log ? s.all.filter((v) => v !== null && v <= 0).length : 0;
    const broken = view.runs.flatMap(({i}) => view.state[i].not_finite.filter((t) => t.startsWith(`${spec.name} at`))
      .map((t) => `${view.numbered ? `${i + 1}: ` : ""}not finite${t.slice(spec.name.length)}`));
    note.textContent = [has ? "" : view.ended ? "no values" : "no values yet",
      hidden ? `${hidden} values ≤ 0 not shown on a logarithmic axis` : "", ...broken].filter(Boolean).join("; ");
    note.classList.toggle("wrong", broken.length > 0);
    point(view);
  }

  function point(view) {
    if (!place) return;
    const {X, Y, ok} = place, marks = [], told = [];
    if (view.step !== null && view.column === "step" && view.step >= view.domain[0] && view.step <= view.domain[1])
      marks.push(drawn("line", {x1: X(view.step), x2: X(view.step), y1: TOP, y2: HEIGHT - BOTTOM}));
    const texts = view.runs.map(({run, i}) => {
      const found = valueAt(run, spec, view.step), item = make("span", "value");
      if (view.numbered) item.append(make("span", `tag ${tone(i)}`, String(i + 1)));
      item.append(make("b", "", found ? written(found.value) : "–"));
      const other = found && found.step !== (view.step ?? lastStep(run));
      if (other) item.append(make("small", "", ` at ${found.step}`));
      if (found && view.step !== null && ok(found.value))
        marks.push(drawn("circle", {class: `mark ${tone(i)}`, cx: X(run[spec.table][view.column][found.i]), cy: Y(found.value), r: 3.5}));
      told.push(`${view.state[i].name}: ${found ? `${written(found.value)} at step ${found.step}` : "no value"}`);
      return item;
    });
    cursor.replaceChildren(...marks);
    values.replaceChildren(...texts);
    svg.setAttribute("aria-label", `${spec.title} over ${view.xTitle}. ${told.join("; ")}`);
  }

  const stepAt = (event, view) => {
    const box = svg.getBoundingClientRect(), px = ((event.clientX - box.left) / box.width) * view.width;
    const x = view.domain[0] + ((px - LEFT) / (place.right - LEFT)) * (view.domain[1] - view.domain[0]);
    return nearestStep(view.runs.map((r) => r.run), view.column, x);
  };
  svg.addEventListener("pointermove", (event) => onStep((view) => stepAt(event, view)));
  svg.addEventListener("pointerleave", () => onStep(() => null));
  svg.addEventListener("click", (event) => onPick((view) => stepAt(event, view)));
  return {node, draw, point, spec};
}
