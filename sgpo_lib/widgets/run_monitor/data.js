// Rows on the page: appended pieces are put where they belong, curves are smoothed and thinned. No DOM here.

const length = (table) => table.step.length;

function settle(rows, pieces) {
  // Appends, in place, every piece that follows what is there. Gives back those that do not fit yet (a state of all
  // rows is on its way, or a message was missed); a piece that is there already, or of rows since dropped, is none.
  const waiting = [];
  for (const piece of pieces) {
    const run = rows[piece.run];
    if (!run || run.epoch > piece.epoch) continue;
    const table = run[piece.table], n = length(table), added = piece.columns.step.length;
    if (run.epoch < piece.epoch || piece.from > n) waiting.push(piece);
    else if (piece.from + added > n)
      for (const name of Object.keys(table)) {
        const values = piece.columns[name] ?? Array(added).fill(null);
        for (let i = n - piece.from; i < added; i++) table[name].push(values[i]);
      }
  }
  return waiting;
}

function receive(model) {
  // Puts what arrives into the model's own rows, once, however many views there are. The last pieces are kept: a state
  // of all rows is unpacked later than a message sent behind it, and would take the message's rows away again.
  let recent = [], timer = 0, waiting = [];
  const place = () => {
    waiting = settle(model.get("rows"), recent);
    if (waiting.length && !timer) timer = setTimeout(ask, 400);
  };
  const ask = () => {
    timer = 0;
    if (waiting.length) model.send({kind: "missing"});
  };
  const onMessage = (message) => {
    if (message?.kind !== "rows") return;
    recent = [...recent, ...message.pieces].slice(-100);
    place();
  };
  model.on("msg:custom", onMessage);
  model.on("change:rows", place);
  return () => {
    clearTimeout(timer);
    model.off("msg:custom", onMessage);
    model.off("change:rows", place);
  };
}

function runningMean(ys, k) {
  // mean of the last k values; a gap stays a gap and does not count
  if (k < 2) return ys;
  const out = [], window = [];
  let sum = 0;
  for (const y of ys) {
    if (y === null) { out.push(null); continue; }
    window.push(y);
    sum += y;
    if (window.length > k) sum -= window.shift();
    out.push(sum / window.length);
  }
  return out;
}

function thin(ys, limit) {
  // Indices to draw: all up to `limit`, else of each bucket the lowest, the highest and a gap where there is one, and
  // the first and the last point.
  const n = ys.length;
  if (n <= limit) return ys.map((_, i) => i);
  const buckets = Math.max(1, Math.floor((limit - 2) / 2)), kept = [0];
  for (let b = 0; b < buckets; b++) {
    const from = 1 + Math.floor((b * (n - 2)) / buckets), to = 1 + Math.floor(((b + 1) * (n - 2)) / buckets);
    let low = -1, high = -1, gap = -1;
    for (let i = from; i < to; i++) {
      if (ys[i] === null) { gap = gap < 0 ? i : gap; continue; }
      if (low < 0 || ys[i] < ys[low]) low = i;
      if (high < 0 || ys[i] > ys[high]) high = i;
    }
    kept.push(...[...new Set([low, high, gap])].filter((i) => i >= 0).sort((a, b) => a - b));
  }
  kept.push(n - 1);
  return kept;
}

function atOrBefore(steps, step) {
  // index of the last step that is not above `step`, -1 where all are
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return low - 1;
}

const lastStep = (run) => Math.max(-1, run.train.step.at(-1) ?? -1, run.eval.step.at(-1) ?? -1);

function valueAt(run, panel, step) {
  // {value, step} of a curve at a step (null: the last one); null where it has none. Evaluations are sparse, so the
  // last one up to the step counts; of training rows only the step itself does.
  const table = run[panel.table], ys = table[panel.column] ?? [];
  let i = step === null ? ys.length - 1 : atOrBefore(table.step, step);
  if (step !== null && step > lastStep(run)) return null;
  if (panel.table === "train" && step !== null && table.step[i] !== step) return null;
  while (i >= 0 && ys[i] === null && (step === null || panel.table === "eval")) i--;
  return i < 0 || ys[i] === null || ys[i] === undefined ? null : {value: ys[i], step: table.step[i], i};
}

function nearestStep(runs, column, x) {
  // step of the row, of any of the runs, whose position on the axis is nearest to x
  let best = null, distance = Infinity;
  for (const run of runs)
    for (const table of [run.train, run.eval]) {
      const xs = table[column], i = atOrBefore(xs, x);
      for (const j of [i, i + 1])
        if (j >= 0 && j < xs.length && Math.abs(xs[j] - x) < distance) {
          distance = Math.abs(xs[j] - x);
          best = table.step[j];
        }
    }
  return best;
}
