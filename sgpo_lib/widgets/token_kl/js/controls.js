// The controls above the text. They hold no state: `app` has it, and `sync` writes it into them.

const DELTA_STEPS = 1000;

function parseDelta(text) {
  // a threshold in nats, or null where the text is none
  const plain = text.trim().toLowerCase().replace(",", ".");
  if (["∞", "inf", "infinity", "none"].includes(plain)) return Infinity;
  const value = plain === "" ? NaN : Number(plain);
  return value >= 0 ? value : null;
}

class Controls {
  constructor(app) {
    const {data} = app, panes = data.panes.map((pane) => [String(pane.number), paneName(pane)]);
    this.app = app;
    this.pane = select("pane", "response", panes, "0", (v) => app.setPane(Number(v)));
    this.compare = select("compare", "beside", [["-1", "none"], ...panes], "-1", (v) => app.setCompare(Number(v)));
    this.frame = input("frame", "range", "checkpoint", (v) => app.setFrame(Number(v)));
    this.frame.min = 0;
    this.frameTold = make("output", "value");
    this.frames = make("label", "", "checkpoint", this.frame, this.frameTold);
    this.metric = select("metric", "colour by", data.metrics.map((m) => [m.key, m.name]), app.metric, (v) => app.setMetric(v));
    this.scale = select("scale", "scale", [["root", "square root"], ["linear", "linear"]], "root", (v) => app.setScale({root: v === "root"}));
    this.most = select("maximum", "up to", [["response", "response maximum"], ["fixed", "fixed value"]], "response",
      (v) => app.setScale({fixed: v === "fixed" ? Number(this.fixed.value) || 1 : null}));
    this.fixed = input("fixed", "number", "value with the last colour, nats", (v) => { if (Number(v) > 0) app.setScale({fixed: Number(v)}); });
    Object.assign(this.fixed, {min: 0, step: "any", value: 1});
    this.delta = input("delta", "range", "delta, nats", (v) => app.setDelta(this.deltaAt(Number(v))));
    Object.assign(this.delta, {min: 0, max: DELTA_STEPS, step: 1});
    this.deltaField = input("delta-value", "text", "delta, nats; inf for none", (v) => {
      const value = parseDelta(v);
      this.deltaField.classList.toggle("wrong", value === null);
      if (value !== null) app.setDelta(value);
    });
    this.deltaField.inputMode = "decimal";
    this.deltaField.addEventListener("blur", () => this.syncDelta());
    const none = button("delta-none", "∞", "no clipping: delta is infinite", () => app.setDelta(Infinity));
    this.share = make("output", "share");
    this.share.dataset.control = "share";
    this.steps = select("steps", "steps", SEGMENTS, "sentence", (v) => app.setSteps(v));
    this.pattern = input("pattern", "text", "regular expression; a step begins at each match", () => app.setPattern(this.pattern.value));
    this.pattern.placeholder = "a step begins at each match";
    this.pattern.maxLength = PATTERN_LIMIT;
    this.wrong = make("span", "wrong");
    this.wrong.setAttribute("role", "alert");
    this.search = input("search", "search", "search in the text", (v) => app.search(v));
    this.search.placeholder = "search ( / )";
    this.search.addEventListener("keydown", (e) => { if (e.key === "Enter") { app.nextHit(e.shiftKey ? -1 : 1); e.preventDefault(); } });
    this.hits = make("output", "value");
    const spaces = input("spaces", "checkbox", "show spaces", () => app.setSpaces(spaces.checked));
    this.peak = make("output", "value");
    const rule = () => make("span", "rule"), group = (...parts) => make("span", "group", ...parts);
    const several = data.panes.length > 1;
    this.node = make("div", "bar",
      several ? this.pane : null, several ? this.compare : null, this.frames, make("span", "line"),
      this.metric, this.scale, this.most, this.fixed, rule(), this.steps, this.pattern, this.wrong,
      make("span", "line"),
      group(make("label", "delta", "δ", this.delta, this.deltaField), none), this.share, rule(),
      group(this.search, button("search-previous", "‹", "previous match (Shift+Enter)", () => app.nextHit(-1)),
        button("search-next", "›", "next match (Enter)", () => app.nextHit(1)), this.hits), rule(),
      group(make("span", "soft", "largest KL"), button("peak-previous", "‹", "token with the next larger KL (p)", () => app.peak(-1)),
        button("peak-next", "›", "token with the next smaller KL, from the largest on (n)", () => app.peak(1)), this.peak), rule(),
      make("label", "", spaces, "spaces"));
    this.node.setAttribute("role", "toolbar");
    this.node.setAttribute("aria-label", "controls of the token view");
  }

  deltaAt(step) {
    // the slider is finer near 0, where most tokens are; three digits are enough there
    const value = this.app.largest * (step / DELTA_STEPS) ** 2;
    return step >= DELTA_STEPS ? this.app.largest : Number(value.toPrecision(3));
  }

  sync() {
    const {app} = this, frames = Math.max(...app.shown.map((s) => s.view.pane.frames.length));
    this.pane.lastChild.value = String(app.pane);
    this.compare.lastChild.value = String(app.compare);
    this.metric.lastChild.value = app.metric;
    this.frames.hidden = frames < 2;
    this.frame.max = frames - 1;
    this.frame.value = app.frame;
    const told = app.shown.map((s) => s.view.pane.frames).sort((a, b) => b.length - a.length)[0];
    this.frameTold.textContent = readable(told[Math.min(app.frame, told.length - 1)].label || String(app.frame));
    this.frame.setAttribute("aria-valuetext", this.frameTold.textContent);
    const agreement = app.kind === "agreement";
    this.scale.hidden = this.most.hidden = agreement;
    this.fixed.hidden = agreement || app.scale.fixed === null;
    this.pattern.hidden = app.mode !== "pattern";
    this.syncDelta();
  }

  syncDelta() {
    const {app} = this, {delta, largest} = app;
    const step = largest > 0 ? Math.round(DELTA_STEPS * Math.sqrt(Math.min(1, delta / largest))) : DELTA_STEPS;
    if (document.activeElement !== this.delta || Math.abs(Number(this.delta.value) - step) > 1) this.delta.value = step;
    this.delta.setAttribute("aria-valuetext", `${shown(delta)} nats`);
    if (document.activeElement !== this.deltaField) {
      this.deltaField.value = delta === Infinity ? "∞" : String(Number(delta.toPrecision(6)));
      this.deltaField.classList.remove("wrong");
    }
    this.share.textContent = app.shown.map(({view, frame}) => {
      const {tokens, share, mass, unknown} = frame.order.masked(delta);
      const whose = app.shown.length > 1 ? `${view.pane.label}: ` : "";
      return `${whose}${whole(tokens)} of ${whole(view.pane.count)} tokens masked (${percent(share)}), ${percent(mass)} of the KL`
        + (unknown ? `, ${whole(unknown)} not known` : "");
    }).join("\n");
  }
}

function paneName(pane) {
  const verdict = pane.correct === null ? "" : pane.correct ? ", correct" : ", wrong";
  return `${pane.label}${verdict}${pane.target ? ", target" : ""}`;
}
