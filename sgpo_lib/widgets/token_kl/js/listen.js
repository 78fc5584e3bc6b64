// Pointer and keys. One listener of each kind for all tokens.

function listen(app) {
  const {root, main, model} = app;
  const found = (target) => {
    // [part, token] of an element, or null
    const span = target instanceof Element ? target.closest(".t") : null;
    const part = span && app.shown.find((s) => s.view.pane.number === span.pane);
    return part ? [part, span.token] : null;
  };

  main.addEventListener("mouseover", (e) => {
    const at = found(e.target);
    if (!at) return;
    app.point(...at);
    if (app.brush && app.brush.part === at[0] && e.buttons & 1 && at[1] !== app.brush.last) {
      app.brush.last = at[1];
      app.choose(at[0], app.brush.i, at[1]);
    }
  });
  main.addEventListener("pointerdown", (e) => {
    const at = e.button === 0 && e.pointerType !== "touch" ? found(e.target) : null;
    if (!at) return;
    const [part, i] = at, anchor = e.shiftKey && app.anchor?.part === part ? app.anchor.i : i;
    part.view.roving(part.view.active, i);
    part.view.spans[i].focus({preventScroll: true});
    app.brush = {part, i: anchor, last: i};
    app.choose(part, anchor, i);
  });
  main.addEventListener("mousedown", (e) => { if (found(e.target)) e.preventDefault(); });  // no selection of text
  main.addEventListener("click", (e) => {
    const at = found(e.target);
    if (at && e.pointerType === "touch") app.choose(at[0], at[1], at[1]);
  });
  main.addEventListener("focusin", (e) => {
    const at = found(e.target);
    if (at) app.point(...at);
  });
  const release = () => { if (app.brush) { app.brush = null; app.send.flush(); } };
  window.addEventListener("pointerup", release);

  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const typing = e.target.matches("select, textarea, input:not([type=range]):not([type=checkbox])");
    if (e.key === "Escape") {
      if (e.target === app.controls.search) { app.controls.search.value = ""; app.search(""); } else app.choose(null);
      e.preventDefault();
      return;
    }
    if (typing) return;
    const at = found(e.target), act = actionOf(app, at, e.key);
    if (!act) return;
    e.preventDefault();
    const to = act();
    if (to === undefined || !at) return;
    const [part, i] = at, from = app.anchor?.part === part ? app.anchor.i : i;
    app.go(part, to);
    if (e.shiftKey) app.choose(part, from, to);
    else app.anchor = null;
  });

  const traits = ["delta", "metric", "pane", "compare", "frame", "selected"];
  const changes = traits.map((name) => [`change:${name}`, () => app.fromPython(name, model.get(name))]);
  for (const [name, act] of changes) model.on(name, act);
  app.unlisten = () => {
    window.removeEventListener("pointerup", release);
    for (const [name, act] of changes) model.off(name, act);
  };
}

function actionOf(app, at, key) {
  // what a key does: a function that gives the token to go to, or nothing
  const anywhere = {n: () => app.peak(1), p: () => app.peak(-1), "/": () => app.controls.search.focus()};
  if (key in anywhere) return () => { anywhere[key](); };
  if (!at) return null;
  const [{view, steps}, i] = at, last = view.pane.count - 1;
  const step = (by) => {
    if (!steps) return i;
    const now = steps.of[i], to = by < 0 && steps.starts[now] < i ? now : Math.min(steps.count - 1, Math.max(0, now + by));
    return steps.starts[to];
  };
  return {ArrowLeft: () => Math.max(0, i - 1), ArrowRight: () => Math.min(last, i + 1), ArrowUp: () => view.beside(i, -1),
    ArrowDown: () => view.beside(i, 1), Home: () => 0, End: () => last, PageUp: () => step(-1), PageDown: () => step(1)}[key] ?? null;
}
