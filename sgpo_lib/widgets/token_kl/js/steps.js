// Where the reasoning steps of a response begin. A step is a run of tokens; blank steps join the one before.

const SEGMENTS = [["sentence", "sentence or line"], ["newline", "newline"], ["paragraph", "double newline"],
  ["numbered", "numbered step"], ["pattern", "regular expression"]];
const PATTERN_LIMIT = 200, PATTERN_TIME = 400, STEP_END = ".;?!:。！？；", DECIMAL = /\d\.$/;
const LIST_MARK = /^\s*\d{1,2}[.)]\s*$/;
const NUMBERED = /^[ \t>*#-]*(?:step\s*)?\(?(?:\d{1,3}|[a-h]|[ivx]{1,4})[.):](?=[\s*]|$)|^[ \t>*#-]*step\s+\d{1,3}\b/gimu;

function sentenceStarts(texts) {
  // first tokens of steps, by the rule of sgpo_lib.analysis.step_of_tokens, and at full stops of Chinese and Japanese
  const starts = [0];
  let step = "", last = "", broken = false;  // of the step so far: its text, last visible character, a line's end after it
  for (let i = 0; i < texts.length; i++) {
    const text = texts[i], visible = text.trimEnd();
    if (visible) last = visible.at(-1);
    broken = (visible ? false : broken) || text.slice(visible.length).includes("\n");
    step = step.length > 64 ? `…${step.slice(-32)}${text}` : step + text;
    const next = i + 1 < texts.length ? texts[i + 1] : "";
    if (!last || !next.trim() || !(broken || STEP_END.includes(last))) continue;
    if ((DECIMAL.test(step) && /^\d/.test(next)) || LIST_MARK.test(step)) continue;
    starts.push(i + 1);
    step = last = "";
    broken = false;
  }
  return starts;
}

function cutsOf(whole, pattern) {
  // where in the text a new step begins: after the match of an end, or at the match of a beginning
  const cuts = [];
  for (const m of whole.matchAll(pattern.expression)) cuts.push(pattern.after ? m.index + m[0].length : m.index);
  return cuts;
}

const EXPRESSIONS = {newline: {expression: /\n+/g, after: true}, paragraph: {expression: /\n[ \t\r]*\n\s*/g, after: true},
  numbered: {expression: NUMBERED, after: false}};

function fromCuts(texts, cuts) {
  // a step begins with the first token that starts at or after a cut
  const starts = [0];
  let at = 0, c = 0, blank = true;
  for (let i = 0; i < texts.length; i++) {
    let cut = false;
    while (c < cuts.length && cuts[c] <= at) { cut = true; c++; }
    if (cut && !blank && i > starts[starts.length - 1]) { starts.push(i); blank = true; }
    if (blank && texts[i].trim()) blank = false;
    at += texts[i].length;
  }
  return starts;
}

function searchApart(whole, source) {
  // the cuts of a user's expression, found in a worker, which is ended when it takes too long
  return new Promise((resolve, reject) => {
    if (source.length > PATTERN_LIMIT) throw new Error(`the expression has more than ${PATTERN_LIMIT} characters`);
    new RegExp(source, "gmu");  // a faulty one throws here, with the reason
    const work = `onmessage = (e) => { const [whole, source] = e.data, cuts = [];
      for (const m of whole.matchAll(new RegExp(source, "gmu"))) { cuts.push(m.index); if (cuts.length > 20000) break; }
      postMessage(cuts); };`;
    const address = URL.createObjectURL(new Blob([work], {type: "text/javascript"}));
    const worker = new Worker(address);
    const end = () => { clearTimeout(timer); worker.terminate(); URL.revokeObjectURL(address); };
    const timer = setTimeout(() => { end(); reject(new Error(`no result within ${PATTERN_TIME} ms; make the expression simpler`)); }, PATTERN_TIME);
    worker.onmessage = (e) => { end(); resolve(e.data); };
    worker.onerror = (e) => { e.preventDefault(); end(); reject(new Error("this page does not let expressions run apart")); };
    worker.postMessage([whole, source]);
  });
}

function stepsFrom(starts, count) {
  // {of: step of each token, starts, ends}
  const of = new Uint32Array(count), ends = starts.slice(1).concat(count);
  starts.forEach((start, s) => of.fill(s, start, ends[s]));
  return {of, starts, ends, count: starts.length};
}

async function segment(texts, mode, source) {
  // steps of a response; throws with a reason for people where a regular expression is at fault
  if (mode === "sentence") return stepsFrom(sentenceStarts(texts), texts.length);
  const whole = texts.join("");
  const cuts = mode === "pattern" ? (source ? await searchApart(whole, source) : []) : cutsOf(whole, EXPRESSIONS[mode]);
  return stepsFrom(fromCuts(texts, cuts), texts.length);
}

function stepMeans(steps, values) {
  // mean of the known values of each step; NaN where none is known
  return steps.starts.map((start, s) => {
    let sum = 0, known = 0;
    for (let i = start; i < steps.ends[s]; i++) if (!Number.isNaN(values[i])) { sum += values[i]; known++; }
    return known ? sum / known : NaN;
  });
}
