// What is known about one token: facts, and the alternatives of both policies beside each other. The panel's places are
// made once and keep their size, so that nothing moves while the pointer goes over the text.

const ROWS_LEAST = 6;

class Details {
  constructor(data) {
    this.data = data;
    this.title = make("div", "title");
    this.place = make("div", "soft place");
    this.facts = make("table", "facts");
    const head = make("tr", "", make("th"), make("th", "", "guided"), make("th", "", "unguided"));
    this.sides = ["probability", "log-prob", "rank", "entropy", "not known"].map((name) => {
      const cells = [make("td"), make("td")];
      const row = make("tr", "", make("th", "", name), ...cells);
      row.firstChild.scope = "row";
      this.facts.append(row);
      return {row, cells};
    });
    this.facts.prepend(head);
    this.metrics = new Map();
    const list = make("table", "metrics");
    for (const {key, name, told} of data.metrics) {
      if (key.endsWith("entropy")) continue;
      const value = make("td"), row = make("tr", "", make("th", "", key === "top1_agree" ? "same top-1" : name), value);
      row.title = told;
      this.metrics.set(key, value);
      list.append(row);
    }
    this.caption = make("caption");
    this.gain = make("th");
    const titles = make("tr", "", make("th", "word", "alternative"), make("th", "", "p guided"), make("th", "", "p unguided"), this.gain);
    this.body = make("tbody");
    this.table = make("table", "alternatives", this.caption, make("thead", "", titles), this.body);
    this.live = make("div", "unseen");
    this.live.setAttribute("aria-live", "polite");
    this.live.setAttribute("role", "status");
    this.node = make("div", "details", make("div", "sheet", this.title, this.place, make("div", "pair", this.facts, list)),
      make("div", "sheet", this.table), this.live);
    this.node.setAttribute("aria-label", "details of a token");
    this.node.setAttribute("role", "region");
    this.empty();
  }

  empty() {
    // nothing is looked at; the row of what a served model does not tell is there where a response came from one
    this.at = null;
    this.title.replaceChildren("point at a token, or reach it by Tab and arrow keys");
    this.place.textContent = "";
    this.sides[4].row.hidden = this.data.panes.every((pane) => pane.frames.every((frame) => frame.exact));
    for (const cell of [...this.sides.flatMap((side) => side.cells), ...this.metrics.values()]) cell.textContent = "";
    this.body.replaceChildren();
    this.caption.textContent = "alternatives of both policies";
    this.gain.textContent = "to KL";
  }

  show(view, frame, steps, i, metric) {
    const {words} = this.data, {pane} = view, reverse = metric === "reverse_kl";
    this.at = {view, i};
    this.title.replaceChildren(quoted(view.texts[i] || view.pieces[i]));
    const step = steps ? `step ${steps.of[i] + 1} of ${steps.count}` : "";
    const piece = view.pieces[i] !== view.texts[i] && view.texts[i] ? `, last piece ${spoken(view.pieces[i])}` : "";
    this.place.textContent = [`${readable(pane.label)}${frame.label && pane.frames.length > 1 ? `, ${readable(frame.label)}` : ""}`,
      `token ${i} of 0–${pane.count - 1}`, step, `id ${words.id[pane.text[i]]}${piece}`].filter(Boolean).join(" · ");
    const both = (row, left, right) => { row.cells[0].textContent = left; row.cells[1].textContent = right; };
    const [probability, logp, rank, entropy, missing] = this.sides;
    const ranked = (r) => (r === 0 ? "–" : r === 65535 ? "≥ 65535" : whole(r));
    both(probability, chance(frame.guided_logp[i]), chance(frame.unguided_logp[i]));
    both(logp, shown(frame.guided_logp[i]), shown(frame.unguided_logp[i]));
    both(rank, ranked(frame.guided_rank[i]), ranked(frame.unguided_rank[i]));
    const bound = (value, digits = 3) => `${frame.exact || Number.isNaN(value) ? "" : "≥ "}${shown(value, digits)}`;
    both(entropy, bound(frame.guided_entropy[i]), bound(frame.unguided_entropy[i]));
    missing.row.hidden = frame.exact;
    if (!frame.exact) both(missing, percent(frame.guided_missing[i]), percent(frame.unguided_missing[i]));
    for (const [key, cell] of this.metrics) {
      const value = frame[key][i];
      cell.textContent = key === "top1_agree" ? (Number.isNaN(value) ? "–" : value ? "yes" : "no")
        : key.endsWith("_kl") ? bound(value) : shown(value);
      cell.parentNode.classList.toggle("on", key === metric);
    }
    this.alternatives(pane, frame, i, reverse);
  }

  alternatives(pane, frame, i, reverse) {
    const {words} = this.data, first = frame.offset[i], count = frame.offset[i + 1] - first;
    const total = reverse ? frame.reverse_kl[i] : frame.forward_kl[i];
    this.gain.textContent = reverse ? "to reverse KL" : "to KL";
    this.gain.title = reverse ? "p unguided · (log p unguided − log p guided), nats" : "p guided · (log p guided − log p unguided), nats";
    const rows = [];
    let guided = 0, unguided = 0, gained = 0;
    for (let k = first; k < first + count; k++) {
      const word = frame.word[k], own = words.id[word] === words.id[pane.text[i]];
      const g = own ? frame.guided_logp[i] : frame.guided[k], u = own ? frame.unguided_logp[i] : frame.unguided[k];
      const part = reverse ? Math.exp(u) * (u - g) : Math.exp(g) * (g - u);
      rows.push([words.text[word], Math.exp(g), Math.exp(u), part, own]);
      guided += Math.exp(g); unguided += Math.exp(u); gained += part;
    }
    this.caption.textContent = `alternatives of both policies${frame.cut ? ` (the ${frame.cut} likeliest at this length)` : ""}`;
    while (this.body.rows.length < rows.length + 1) this.body.append(alternativeRow());
    [...this.body.rows].forEach((row, k) => {
      row.hidden = k > rows.length;
      if (k < rows.length) fill(row, ...rows[k]);
      else if (k === rows.length) fill(row, null, clip(1 - guided), clip(1 - unguided), frame.exact ? total - gained : NaN, false);
    });
  }

  say(view, frame, i) {
    // for those who hear: short, and only when the keyboard moved
    this.live.textContent = `${spoken(view.texts[i] || view.pieces[i])}, KL ${shown(frame.forward_kl[i])}, probability guided `
      + `${chance(frame.guided_logp[i])}, unguided ${chance(frame.unguided_logp[i])}`;
  }
}

function clip(share) {
  return Number.isNaN(share) ? NaN : Math.max(0, share);
}

function chance(logp, digits = 4) {
  // a probability; small ones with two digits that count
  const p = Math.exp(logp);
  return p > 0 && p < 10 ** -digits ? p.toExponential(1).replaceAll("-", "−") : shown(p, digits);
}

function alternativeRow() {
  const bar = () => make("td", "p", make("i"), make("span"));
  return make("tr", "", make("td", "word"), bar(), bar(), make("td", "gain"));
}

function fill(row, text, guided, unguided, gain, own) {
  const [word, g, u, part] = row.cells;
  row.classList.toggle("own", own);
  row.title = own ? "the sampled token" : "";
  word.replaceChildren(text === null ? make("i", "soft", "all others") : quoted(text));
  for (const [cell, p] of [[g, guided], [u, unguided]]) {
    cell.firstChild.style.width = `${Number.isNaN(p) ? 0 : Math.min(100, 100 * p)}%`;
    cell.lastChild.textContent = chance(Math.log(p), 3);
  }
  part.textContent = Number.isNaN(gain) ? "–" : Math.abs(gain) < 0.0005 ? "0.000"
    : `${gain > 0 ? "+" : "−"}${Math.abs(gain).toFixed(3)}`;
}
