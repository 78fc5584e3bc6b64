// The page's side of the strategy inspector. shared/make.js and `katex` stand above this text (see __init__.py). Model
// text only ever becomes text nodes, or goes to KaTeX without trust; no HTML is parsed from it.

const MATH = /\$\$([\s\S]+?)\$\$|\$((?:\\.|[^$\\])+?)\$|\\\(([\s\S]+?)\\\)|\\\[([\s\S]+?)\\\]|(\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})/g;
const BANDS = ["High", "Medium", "Low", "no score"];
const NAMES = {type: "type", strategy: "strategy", steps: "steps", no_leak: "no leak"};

function pieces(text) {
  // [start, end, tex or null, display] in order
  const found = [];
  let last = 0;
  for (const m of text.matchAll(MATH)) {
    if (m.index > last) found.push([last, m.index, null, false]);
    const tex = m[1] ?? m[2] ?? m[3] ?? m[4] ?? m[5];
    found.push([m.index, m.index + m[0].length, tex, m[1] !== undefined || m[4] !== undefined]);
    last = m.index + m[0].length;
  }
  if (last < text.length) found.push([last, text.length, null, false]);
  return found;
}

function formula(tex, display, source) {
  const span = make("span", display ? "display" : "");
  try {
    katex.render(readable(tex), span, {output: "mathml", displayMode: display, throwOnError: true, trust: false,
      strict: "ignore", maxExpand: 200, maxSize: 20});
    const root = span.querySelector("math");
    if (!root) throw new Error("no formula");
    root.setAttribute("title", tex);
  } catch {
    span.textContent = readable(source);  // what KaTeX cannot read is shown as it was written
  }
  return span;
}

function written(text, leaks = [], offset = 0) {
  // text with formulas rendered and leaks marked; `offset` is where the text begins in what the leaks count in
  const box = make("span", "text");
  const marks = leaks.map((l) => [l.start - offset, l.end - offset, l]).filter(([a, b]) => b > 0 && a < text.length);
  for (const [start, end, tex, display] of pieces(text)) {
    const over = marks.find(([a, b]) => a < end && b > start);
    if (tex !== null) {
      const node = formula(tex, display, text.slice(start, end));
      box.append(over ? marked(node, over[2]) : node);
      continue;
    }
    let at = start;
    for (const [a, b, leak] of marks.filter(([a, b]) => a < end && b > start)) {
      const from = Math.max(a, at), to = Math.min(b, end);
      if (from > at) box.append(readable(text.slice(at, from)));
      if (to > from) box.append(marked(text.slice(from, to), leak));
      at = Math.max(at, to);
    }
    if (at < end) box.append(readable(text.slice(at, end)));
  }
  return box;
}

function marked(content, leak) {
  const node = make("mark", leak.kind, content);
  node.title = `${leak.kind} (${leak.form})`;
  return node;
}

function score(name, value) {
  const track = make("span", "track", make("span", "fill"));
  track.firstChild.style.width = `${Math.round(100 * value)}%`;
  const node = make("span", "score", name, track, value.toFixed(2));
  node.title = `${name}: ${value.toFixed(2)} of 1`;
  return node;
}

function choice(label, options, value, onChange) {
  const select = make("select");
  for (const [key, told] of options) {
    const option = make("option", "", told);
    option.value = key;
    select.append(option);
  }
  select.value = value;
  select.setAttribute("aria-label", label);
  select.addEventListener("change", () => onChange(select.value));
  return make("label", "", label, select);
}

function button(text, title, onClick, className = "") {
  const node = make("button", className, text);
  node.type = "button";
  node.title = title;
  node.addEventListener("click", onClick);
  return node;
}

export default {
  render({model, el}) {
    const root = make("div", "sgpo-inspector");
    root.tabIndex = 0;
    root.setAttribute("data-lm-suppress-shortcuts", "true");  // JupyterLab's own keys stay out of here
    el.append(root);
    const view = {band: "all", of: "overall", leak: "all", subject: "all", decision: "all", sort: "order", editing: null, comment: null};

    const shown = () => {
      const rows = model.get("index").map((row, i) => ({...row, i}));
      const band = (r) => view.of === "overall" ? r.band : r.bands[view.of] ?? "no score";
      const kept = rows.filter((r) => (view.band === "all" || band(r) === view.band)
        && (view.leak === "all" || (view.leak === "none" ? r.leaks.length === 0
          : view.leak === "any candidate" ? r.leaks_any.length > 0 : r.leaks.includes(view.leak)))
        && (view.subject === "all" || r.subject === view.subject)
        && (view.decision === "all" || r.decision === view.decision));
      const key = {order: (r) => r.i, "score, lowest first": (r) => r.score ?? -1, "score, highest first": (r) => -(r.score ?? -1),
        "leaks first": (r) => r.leaks.includes("answer") ? 0 : r.leaks.length ? 1 : 2};
      if (view.sort === "subject") return kept.sort((a, b) => a.subject.localeCompare(b.subject) || a.i - b.i);
      const by = key[view.sort] ?? ((r) => r.criteria[view.sort] ?? -1);
      return kept.sort((a, b) => by(a) - by(b) || a.i - b.i);
    };

    const go = (step) => {
      const rows = shown();
      if (!rows.length) return;
      const at = rows.findIndex((r) => r.i === model.get("selected"));
      const next = at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + step));
      select(rows[next].i);
    };
    const select = (i) => {
      const item = model.get("item");
      if (view.comment !== null && view.comment !== item.comment) decide(item.decision);  // typed, not yet stored
      view.editing = view.comment = null;
      model.set("selected", i);
      model.save_changes();
    };
    const accept = () => decide("accepted", model.get("item").quarantined ? {confirm: true} : {});
    const decide = (decision, more = {}) => {
      const item = model.get("item");
      const comment = view.comment ?? item.comment;
      view.editing = null;
      model.send({id: item.id, decision, candidate: item.picked, comment, ...more});
    };

    function filters() {
      const index = model.get("index");
      const subjects = [...new Set(index.map((r) => r.subject).filter(Boolean))];
      const rows = shown(), at = rows.findIndex((r) => r.i === model.get("selected"));
      const change = (name) => (value) => { view[name] = value; const found = shown();
        if (found.length && !found.some((r) => r.i === model.get("selected"))) select(found[0].i); draw(); };
      const pairs = (...names) => names.map((n) => [n, n]);
      const bar = make("div", "bar",
        choice("band", pairs("all", ...BANDS), view.band, change("band")),
        choice("of", [["overall", "overall"], ...Object.entries(NAMES)], view.of, change("of")),
        choice("leaks", pairs("all", "none", "answer", "intermediate", "any candidate"), view.leak, change("leak")),
        choice("subject", pairs("all", ...subjects), view.subject, change("subject")),
        choice("decision", pairs("all", "undecided", "accepted", "rejected"), view.decision, change("decision")),
        choice("sort", [...pairs("order", "score, lowest first", "score, highest first", "leaks first", "subject"),
          ...Object.entries(NAMES)], view.sort, change("sort")),
        make("span", "spacer"),
        make("span", "", `${at < 0 ? "–" : at + 1} of ${rows.length}${rows.length < index.length ? ` (${index.length} in all)` : ""}`),
        button("‹ previous", "previous problem (← or k)", () => go(-1)),
        button("next ›", "next problem (→ or j)", () => go(1)));
      return bar;
    }

    function problem(item) {
      return make("div", "left",
        make("h4", "", `Problem ${item.id}${item.subject ? `, ${item.subject}` : ""}`), written(item.problem),
        make("h4", "", "Answer"), written(/[$\\]/.test(item.answer) ? `$${item.answer}$` : item.answer),
        make("h4", "", "Response"), written(item.solution || "none"),
        item.notes.length ? make("div", "notes", item.notes.join("; ")) : null);
    }

    function card(item, candidate, i) {
      const picked = i === item.picked;
      const head = make("div", "head", make("b", "", `${i + 1}`),
        button(picked ? "picked" : "pick", `pick candidate ${i + 1} (key ${i + 1})`, () => pick(i), picked ? "on" : ""),
        i === item.chosen ? make("span", "tag", "highest score") : null,
        candidate.kind ? make("span", "tag", candidate.kind) : null,
        candidate.leaks.length ? make("span", "tag leaks", `leaks: ${[...new Set(candidate.leaks.map((l) => l.kind))].join(", ")}`) : null,
        candidate.reason ? make("span", "tag leaks", candidate.reason) : null);
      const scores = make("span", "scores");
      if (candidate.score !== undefined && candidate.score !== null) scores.append(score("score", candidate.score));
      if (candidate.quality !== undefined && candidate.quality !== null) scores.append(score("mean", candidate.quality));
      for (const name of item.criteria) if (name in candidate.criteria) scores.append(score(NAMES[name] ?? name, candidate.criteria[name]));
      head.append(scores);
      const node = make("div", `card${picked ? " picked" : ""}`, head);
      if (picked && view.editing) {
        node.append(editor(candidate));
      } else if (candidate.parts.length) {
        for (const part of candidate.parts)
          node.append(make("div", "part", make("span", "name", part.label), written(part.text, candidate.leaks, part.start)));
      } else {
        node.append(make("div", "part", make("span", "text", candidate.raw || "no reply")));
      }
      if (candidate.comment) node.append(make("div", "comment", candidate.comment));
      return node;
    }

    function pick(i) {
      const item = model.get("item");
      view.editing = null;
      model.send({id: item.id, decision: item.decision, candidate: i, comment: view.comment ?? item.comment});
    }

    function editor(candidate) {
      const s = candidate.strategy ?? {problem_type: "", strategy: "", steps: []};
      const now = view.editing === true ? view.editing = {problem_type: s.problem_type, strategy: s.strategy,
        steps: s.steps.join("\n")} : view.editing;
      const field = (name, label) => {
        const area = make("textarea");
        area.value = now[name];
        area.dataset.field = name;
        area.addEventListener("input", () => { now[name] = area.value; });
        return make("div", "part", make("span", "name", label), area);
      };
      return make("div", "", field("problem_type", "Problem type"), field("strategy", "Strategy"),
        field("steps", "Steps, one a line"),
        make("div", "head", button("save", "save the wording and accept it", () => decide("accepted", {edited: {
          problem_type: now.problem_type, strategy: now.strategy,
          steps: now.steps.split("\n").map((t) => t.trim()).filter(Boolean)}})),
        button("cancel", "leave the wording as it was (Esc)", () => { view.editing = null; draw(); })));
    }

    function foot(item) {
      const comment = make("input");
      comment.placeholder = "comment (c)";
      comment.value = view.comment ?? item.comment;
      comment.addEventListener("input", () => { view.comment = comment.value; });
      comment.addEventListener("keydown", (e) => { if (e.key === "Enter") decide(item.decision); });
      return make("div", "foot",
        button("accept", "accept the picked candidate (a)", accept, item.decision === "accepted" ? "on" : ""),
        button("reject", "reject this problem's strategies (r)", () => decide("rejected"), item.decision === "rejected" ? "on" : ""),
        button("edit", "edit the picked candidate (e)", () => { view.editing = true; draw(); }),
        button("undo", "back to undecided (u)", () => decide("undecided")), comment,
        item.decision !== "undecided" ? make("span", `tag ${item.decision}`, item.decision) : null,
        item.quarantined ? make("span", "tag leaks", "leaks: in quarantine") : null,
        item.edited ? make("span", "tag", "edited") : null,
        make("kbd", "", "← → problems, 1–5 pick, a accept, r reject, e edit, c comment"));
    }

    function draw() {
      const item = model.get("item"), told = model.get("told");
      const had = root.contains(document.activeElement), scrolls = [...root.querySelectorAll(".left, .right")].map((n) => n.scrollTop);
      if (!item || !item.id) {
        root.replaceChildren(make("div", "told", "no problems to show"));
        return;
      }
      const same = root.dataset.id === item.id;
      root.dataset.id = item.id;
      root.replaceChildren(filters(), make("div", "body", problem(item),
        make("div", "right", ...item.candidates.map((c, i) => card(item, c, i)))), foot(item),
        make("div", `told${told.startsWith("not stored") ? " wrong" : ""}`, told));
      if (same) root.querySelectorAll(".left, .right").forEach((n, i) => { n.scrollTop = scrolls[i] ?? 0; });
      if (had) root.focus({preventScroll: true});
    }

    root.addEventListener("keydown", (e) => {
      const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(e.target.tagName);
      if (e.key === "Escape") { view.editing = null; draw(); root.focus(); }
      if (typing || e.ctrlKey || e.metaKey || e.altKey) return;
      const item = model.get("item");
      const keys = {ArrowLeft: () => go(-1), k: () => go(-1), ArrowRight: () => go(1), j: () => go(1),
        a: accept, r: () => decide("rejected"), u: () => decide("undecided"),
        e: () => { view.editing = true; draw(); root.querySelector("textarea")?.focus(); },
        c: () => root.querySelector(".foot input")?.focus()};
      const number = Number(e.key);
      const act = keys[e.key] ?? (number >= 1 && number <= item.candidates.length ? () => pick(number - 1) : null);
      if (act) { e.preventDefault(); act(); }
    });

    const patch = ({place, row}) => { model.get("index")[place] = row; draw(); };
    const names = ["change:item", "change:index", "change:told"];
    names.forEach((name) => model.on(name, draw));
    model.on("msg:custom", patch);
    draw();
    return () => { names.forEach((name) => model.off(name, draw)); model.off("msg:custom", patch); };
  },
};
