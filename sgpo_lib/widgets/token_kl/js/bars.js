// Step bars (after Fig. 5): mean KL upwards and mean SFT loss downwards, one column per reasoning step.

class Bars {
  // `on(event, step)`: event is "over", "out" or "go"
  constructor(view, on) {
    this.view = view;
    this.columns = [];
    this.active = 0;
    this.strip = make("div", "strip");
    this.strip.setAttribute("role", "listbox");
    this.strip.setAttribute("aria-label", `steps of ${spoken(view.pane.label)}`);
    this.strip.setAttribute("aria-orientation", "horizontal");
    this.told = make("div", "told");
    this.ends = [make("span"), make("span")];
    const axis = make("div", "axis", make("span", "kl", "mean KL"), this.ends[0], make("span", "sft", "mean SFT loss"), this.ends[1]);
    this.node = make("div", "bars", axis, this.strip, this.told);
    const stepOf = (e) => e.target.closest(".column")?.step;
    this.strip.addEventListener("mouseover", (e) => { const s = stepOf(e); if (s !== undefined) on("over", s); });
    this.strip.addEventListener("mouseleave", () => on("out", -1));
    this.strip.addEventListener("click", (e) => { const s = stepOf(e); if (s !== undefined) { this.roving(s); on("go", s); } });
    this.strip.addEventListener("focusin", (e) => { const s = stepOf(e); if (s !== undefined) on("over", s); });
    this.strip.addEventListener("keydown", (e) => {
      const last = this.columns.length - 1;
      const to = {ArrowLeft: this.active - 1, ArrowRight: this.active + 1, Home: 0, End: last}[e.key];
      if (to !== undefined) { this.roving(Math.min(last, Math.max(0, to))); this.columns[this.active].focus(); }
      else if (e.key === "Enter" || e.key === " ") on("go", this.active);
      else return;
      e.preventDefault();
      e.stopPropagation();
    });
  }

  roving(step) {
    this.columns[this.active]?.removeAttribute("tabindex");
    this.active = step;
    this.columns[step].tabIndex = 0;
  }

  segment(steps) {
    // new columns for new steps
    this.steps = steps;
    this.columns = steps.starts.map((start, s) => {
      const column = make("div", "column");
      column.step = s;
      column.setAttribute("role", "option");
      column.setAttribute("data-lm-suppress-shortcuts", "true");
      return column;
    });
    this.strip.replaceChildren(...this.columns);
    this.active = 0;
    this.roving(0);
    this.lit = -1;
  }

  meansOf(frame) {
    return {kl: stepMeans(this.steps, frame.forward_kl), sft: stepMeans(this.steps, frame.sft_loss)};
  }

  update(frame, most) {
    // `most`: ends of the two scales, which all checkpoints and all shown responses have in common
    const {kl, sft} = this.means = this.meansOf(frame);
    this.columns.forEach((column, s) => {
      column.style.setProperty("--up", `${Number.isNaN(kl[s]) ? 0 : 100 * Math.max(0, kl[s]) / most[0]}%`);
      column.style.setProperty("--down", `${Number.isNaN(sft[s]) ? 0 : 100 * Math.min(1, sft[s] / most[1])}%`);
      column.setAttribute("aria-label", `step ${s + 1}, mean KL ${shown(kl[s])}, mean SFT loss ${shown(sft[s])}`);
    });
    most.forEach((value, k) => { this.ends[k].textContent = `to ${shown(value, 2)}`; });
    this.tell(-1);
  }

  light(step, scroll = true) {
    // mark a column; -1 for none
    if (this.lit >= 0) this.columns[this.lit]?.classList.remove("lit");
    this.lit = step;
    if (step >= 0) {
      const column = this.columns[step];
      column.classList.add("lit");
      if (scroll) {
        const left = column.offsetLeft - this.strip.offsetLeft, {scrollLeft, clientWidth} = this.strip;
        if (left < scrollLeft || left > scrollLeft + clientWidth - 12) this.strip.scrollLeft = left - clientWidth / 2;
      }
    }
    this.tell(step);
  }

  tell(step) {
    if (step < 0 || !this.means) {
      this.told.textContent = this.steps ? `${whole(this.steps.count)} step${this.steps.count > 1 ? "s" : ""}, nats per token` : "";
      return;
    }
    const {starts, ends} = this.steps, texts = this.view.texts.slice(starts[step], Math.min(ends[step], starts[step] + 24));
    const count = ends[step] - starts[step];
    this.told.textContent = `step ${step + 1} of ${this.steps.count}: ${whole(count)} token${count > 1 ? "s" : ""}, mean KL ${shown(this.means.kl[step])}, `
      + `mean SFT loss ${shown(this.means.sft[step])} · ${spoken(texts.join("").trim()).slice(0, 90)}`;
  }
}
