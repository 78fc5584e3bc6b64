// A page without Python: the widget runs on a small model that holds what the page brought along.

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function pageModel(state) {
  const listeners = new Map();
  return {
    get: (name) => state[name],
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      for (const act of [...(listeners.get(`change:${name}`) ?? [])]) act();
    },
    on(name, act) { listeners.set(name, [...(listeners.get(name) ?? []), act]); },
    off(name, act) { listeners.set(name, (listeners.get(name) ?? []).filter((a) => a !== act)); },
    save_changes() {},
    send() {},
  };
}

function switchTheme() {
  const next = {light: "dark", dark: "auto", auto: "light"}, html = document.documentElement, node = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const look = () => {
    const chosen = html.dataset.choice ?? "auto";
    html.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
    node.textContent = `theme: ${chosen === "auto" ? "as the system" : chosen}`;
  };
  node.addEventListener("click", () => { html.dataset.choice = next[html.dataset.choice ?? "auto"]; look(); });
  dark.addEventListener("change", look);
  look();
}

function runPage() {
  performance.mark("sgpo-kl begin");
  switchTheme();
  const state = JSON.parse(document.getElementById("state").textContent);
  state.blobs = [...document.querySelectorAll("script.blob")].map((node) => bytesOf(node.textContent));
  const model = pageModel(state);
  widget.render({model, el: document.getElementById("widget")});
  window.sgpoModel = model;  // for tests, and for whoever looks into the page
  requestAnimationFrame(() => setTimeout(() => performance.mark("sgpo-kl painted")));
}
