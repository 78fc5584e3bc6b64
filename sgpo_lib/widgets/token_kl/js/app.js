// The microscope: state, and what follows when it changes. Traits of the Python side: delta, metric, pane, compare,
// frame, selected; they lead here too, so that a change from either side comes out the same.

const SEND_GAP = 100;
const HELP = [["← → ↑ ↓", "tokens"], ["Home End", "first, last"], ["PgUp PgDn", "steps"], ["Shift", "with these or drag: select"],
  ["n p", "largest KL, next, back"], ["/", "search"], ["Esc", "clear"]];

function numberOf(value) {
  return value === "inf" || value === null ? Infinity : Number(value);
}

class Microscope {
  constructor(model, el) {
    this.model = model;
    this.data = decode(model.get("header"), model.get("blobs"));
    this.root = make("div", "sgpo-kl");
    this.root.setAttribute("data-lm-suppress-shortcuts", "true");
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", this.data.title || "KL of every token");
    Object.assign(this, {pane: this.within(model.get("pane")), compare: model.get("compare"), frame: model.get("frame"),
      metric: model.get("metric"), delta: numberOf(model.get("delta")), selected: model.get("selected") ?? {},
      scale: {root: true, fixed: null}, mode: "sentence", pattern: "", spaces: false, words: "", hits: [], hit: -1,
      shown: [], made: new Map(), brush: null, pending: {}, rank: -1, turn: 0});
    this.details = new Details(this.data);
    this.controls = new Controls(this);
    this.legend = make("div", "legend");
    this.main = make("div", "main");
    const help = make("div", "help");
    for (const [keys, told] of HELP) help.append(make("kbd", "", keys), ` ${told}  `);
    this.root.append(...[this.data.title ? make("div", "heading", this.data.title) : null, this.controls.node, this.legend,
      this.main, help].filter(Boolean));
    el.append(this.root);
    this.unfollow = followTheme(this.root);
    this.send = throttled(() => {
      for (const [name, value] of Object.entries(this.pending)) this.model.set(name, value);
      this.pending = {};
      this.model.save_changes();
    }, SEND_GAP);
    this.arrange();
    listen(this);
  }

  within(pane) {
    return Math.min(this.data.panes.length - 1, Math.max(0, pane));
  }

  tell(name, value) {
    // to Python, at most ten times a second, and always the last value
    this.pending[name] = value;
    this.send();
  }

  get kind() {
    return this.data.metrics.find((m) => m.key === this.metric)?.kind ?? "sequential";
  }

  get largest() {
    // the largest KL of the shown responses at all their checkpoints: the slider's end
    return Math.max(...this.shown.flatMap((s) => s.view.pane.frames.map((f) => f.most.forward_kl))) || 0;
  }

  get scaleEnd() {
    // the value with the last colour, the same for all that is shown, so that checkpoints can be compared
    return this.scale.fixed ?? (Math.max(...this.shown.flatMap((s) => s.view.pane.frames.map((f) => f.most[this.metric] ?? 1))) || 1);
  }

  one(number) {
    // view and bars of a pane, made once
    if (!this.made.has(number)) {
      const view = new TextView(this.data.panes[number], this.data.words);
      const part = {view, frame: view.pane.frame(this.frame), steps: null, tags: make("div", "tags"), cut: ""};
      part.bars = new Bars(view, (event, step) => this.onStep(part, event, step));
      part.column = make("div", "response", part.tags, view.node);
      if (this.spaces) view.rewrite(true);
      this.made.set(number, part);
    }
    return this.made.get(number);
  }

  arrange() {
    // put the shown responses into place
    const second = this.compare >= 0 && this.compare < this.data.panes.length && this.compare !== this.pane;
    this.shown = [this.pane, ...(second ? [this.compare] : [])].map((number) => this.one(number));
    this.main.className = second ? "main double" : "main";
    const bars = make("div", "allbars", ...this.shown.map((s) => s.bars.node));
    this.main.replaceChildren(...this.shown.map((s) => s.column), this.details.node, bars);
    this.rank = -1;
    this.controls.peak.textContent = "";
    this.look();
    this.cutSteps();
    this.search(this.words, false);
    this.showSelected();
  }

  look() {
    // everything that follows from frame, metric and scale
    const level = levelOf(this.kind, this.scale.root, this.scaleEnd);
    for (const part of this.shown) {
      part.frame = part.view.pane.frame(this.frame);
      part.view.paint(part.frame[this.metric], level, part.frame, this.delta);
      part.tags.replaceChildren(...tagsOf(part));
      if (part.steps) part.bars.update(part.frame, this.barEnds);
    }
    this.legend.replaceChildren(...legendOf(this));
    this.controls.sync();
    this.again();
  }

  again() {
    // the details of the token that was looked at last, as it is now
    const {at} = this.details, part = at && this.shown.find((s) => s.view === at.view);
    if (part) this.details.show(at.view, part.frame, part.steps, at.i, this.metric);
    else if (at) this.details.empty();
  }

  setPane(pane) {
    if (pane === this.pane) return;
    if (pane === this.compare) this.setCompare(this.pane, false);
    this.pane = this.within(pane);
    this.tell("pane", this.pane);
    this.arrange();
  }

  setCompare(pane, draw = true) {
    if (pane === this.compare) return;
    this.compare = pane;
    this.tell("compare", pane);
    if (draw) this.arrange();
  }

  setFrame(frame) {
    if (frame === this.frame) return;
    this.frame = frame;
    this.rank = -1;
    this.tell("frame", frame);
    this.look();
  }

  setMetric(metric) {
    if (metric === this.metric) return;
    this.metric = metric;
    this.tell("metric", metric);
    this.look();
  }

  setScale(change) {
    Object.assign(this.scale, change);
    this.look();
  }

  setDelta(delta) {
    if (delta === this.delta) return;
    for (const {view, frame} of this.shown) view.shift(frame, this.delta, delta);
    this.delta = delta;
    this.tell("delta", delta === Infinity ? "inf" : delta);
    this.controls.syncDelta();
  }

  setSpaces(spaces) {
    this.spaces = spaces;
    for (const part of this.made.values()) part.view.rewrite(spaces);
  }

  setSteps(mode) {
    this.mode = mode;
    this.controls.sync();
    this.cutSteps();
  }

  setPattern(pattern) {
    this.pattern = pattern;
    clearTimeout(this.wait);
    this.wait = setTimeout(() => this.cutSteps(), 250);  // while it is being typed
  }

  async cutSteps() {
    // steps of what is shown; a faulty or slow expression is told and the steps stay as they were
    const turn = ++this.turn, cut = `${this.mode} ${this.mode === "pattern" ? this.pattern : ""}`;
    let wrong = "";
    for (const part of this.shown) {
      if (part.cut === cut && part.steps) continue;
      try {
        const steps = await segment(part.view.texts, this.mode, this.pattern);
        if (turn !== this.turn) return;
        Object.assign(part, {steps, cut});
        part.view.flag("data-begins", steps.starts.slice(1));
        part.bars.segment(steps);
        part.means = part.view.pane.frames.map((_, f) => part.bars.meansOf(part.view.pane.frame(f)));
      } catch (error) {
        wrong = error.message;  // a person's expression
      }
    }
    if (turn !== this.turn) return;
    this.controls.wrong.textContent = wrong;
    const cutAlready = this.shown.filter((s) => s.steps), means = cutAlready.flatMap((s) => s.means);
    this.barEnds = [largestOf(means.map((m) => m.kl)), largestOf(means.map((m) => m.sft))];
    for (const part of cutAlready) part.bars.update(part.frame, this.barEnds);
    this.again();
  }

  onStep(part, event, step) {
    const {starts, ends} = part.steps;
    part.view.flag("data-lit", event === "out" ? [] : range(starts[step], ends[step]));
    part.bars.light(event === "out" ? -1 : step, false);
    if (event === "go") {
      part.view.reveal(starts[step]);
      this.point(part, starts[step]);
      part.view.roving(part.view.active, starts[step]);
    }
  }

  point(part, i) {
    this.details.show(part.view, part.frame, part.steps, i, this.metric);
    if (part.steps) part.bars.light(part.steps.of[i]);
  }

  go(part, i) {
    // to a token by keyboard, search or jump
    part.view.focus(i);
    this.details.say(part.view, part.frame, i);
  }

  peak(by) {
    // the token with the n-th largest KL
    const part = this.shown.find((s) => s.view === this.details.at?.view) ?? this.shown[0], {order} = part.frame.order;
    if (!order.length) return;
    if (part !== this.ranked) this.rank = -1;
    this.ranked = part;
    this.rank = Math.min(order.length - 1, Math.max(0, this.rank + by));
    const i = order[order.length - 1 - this.rank];
    this.controls.peak.textContent = `no. ${whole(this.rank + 1)} of ${whole(order.length)}`;
    this.go(part, i);
  }

  search(words, jump = true) {
    this.words = words;
    this.hits = this.shown.flatMap((part) => hitsOf(part.view, words).map(([first, last]) => ({part, first, last})));
    for (const part of this.shown)
      part.view.flag("data-hit", this.hits.filter((h) => h.part === part).flatMap((h) => range(h.first, h.last + 1)));
    this.hit = -1;
    if (jump && this.hits.length) this.nextHit(1, false); else this.markHit();
  }

  nextHit(by) {
    if (!this.hits.length) return;
    this.hit = (this.hit + by + this.hits.length) % this.hits.length;
    this.markHit();
    const {part, first} = this.hits[this.hit];
    part.view.roving(part.view.active, first);
    part.view.reveal(first);
    this.point(part, first);
  }

  markHit() {
    const now = this.hits[this.hit], most = this.hits.length >= HITS_MOST ? "+" : "";
    for (const part of this.shown) part.view.flag("data-hit-now", now?.part === part ? range(now.first, now.last + 1) : []);
    this.controls.hits.textContent = !this.words ? "" : this.hits.length ? `${this.hit + 1} of ${whole(this.hits.length)}${most}` : "none";
  }

  choose(part, anchor, i) {
    // select from token anchor to token i, in either order; part null: nothing
    this.selected = part ? {pane: part.view.pane.number, start: Math.min(anchor, i), end: Math.max(anchor, i) + 1} : {};
    this.anchor = part ? {part, i: anchor} : null;
    this.tell("selected", this.selected);
    this.showSelected();
  }

  showSelected() {
    const {pane, start, end} = this.selected;
    for (const part of this.shown) {
      const tokens = part.view.pane.number === pane ? range(start, Math.min(end, part.view.pane.count)) : [];
      part.view.flag("data-selected", tokens);
      part.column.classList.toggle("chosen", tokens.length > 0);
    }
  }

  fromPython(name, value) {
    // a trait changed there (or here: then nothing is left to do)
    if (name in this.pending) return;
    if (name === "delta") this.setDelta(numberOf(value));
    if (name === "metric") this.setMetric(value);
    if (name === "pane") this.setPane(value);
    if (name === "compare") this.setCompare(value);
    if (name === "frame") this.setFrame(value);
    if (name === "selected" && JSON.stringify(value) !== JSON.stringify(this.selected)) {
      this.selected = value ?? {};
      this.anchor = null;
      this.showSelected();
    }
  }

  close() {
    this.send.flush();
    clearTimeout(this.wait);
    this.unfollow();
    this.unlisten();
    this.root.remove();
  }
}

function tagsOf({view, frame}) {
  const {pane} = view, tag = (text, kind = "", title = "") => {
    const node = make("span", `tag ${kind}`, text);
    if (title) node.title = title;
    return node;
  };
  return [make("b", "", pane.label), pane.group && pane.group !== pane.label ? tag(pane.group) : null,
    pane.correct === null ? null : pane.correct ? tag("✓ correct", "good") : tag("✗ wrong", "bad"),
    pane.target ? tag("★ reachable target o⁺", "target", "Eq. 4: of the correct guided responses, the one with the largest summed unguided log-probability") : null,
    frame.exact ? null : tag("approximate", "bad", "from a served model's top-k: divergences and entropies are lower bounds"),
    make("span", "soft", [`${whole(pane.count)} token${pane.count > 1 ? "s" : ""}`, `Σ log p unguided ${shown(frame.unguided_sum, 1)}`, `mean KL ${frame.exact ? "" : "≥ "}${shown(frame.mean_kl)}`,
      frame.label && pane.frames.length > 1 ? frame.label : ""].filter(Boolean).join(" · "))].filter(Boolean);
}

function legendOf(app) {
  const metric = app.data.metrics.find((m) => m.key === app.metric), swatch = (name) => make("i", `swatch ${name}`);
  const end = shown(app.scaleEnd, 2), ramp = make("span", "ramp");
  const parts = [make("b", "", metric.name), ramp];
  if (app.kind === "agreement") {
    ramp.append(swatch("plain"), " same ", swatch("d1"), " different");
  } else if (app.kind === "diverging") {
    ramp.append(`−${end} `, ...range(0, SIGNED).map((k) => swatch(`n${SIGNED - k}`)), swatch("plain"),
      ...range(1, SIGNED + 1).map((k) => swatch(`p${k}`)), ` +${end} nats`);
  } else {
    ramp.append("0 ", swatch("plain"), ...range(1, LEVELS + 1).map((k) => swatch(`s${k}`)), ` ${end} nats`);
  }
  parts.push(make("span", "soft", metric.told), make("span", "key", swatch("plain over"), " KL above δ: masked (Eq. 5)"));
  if (app.shown.some((s) => !s.frame.exact)) parts.push(make("span", "key", swatch("unknown"), " not known"));
  return parts;
}

const widget = {
  render({model, el}) {
    let app = new Microscope(model, el);
    const renew = () => { app.close(); app = new Microscope(model, el); };
    model.on("change:blobs", renew);
    return () => { model.off("change:blobs", renew); app.close(); };
  },
};
