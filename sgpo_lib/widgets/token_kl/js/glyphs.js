// How the text of a token is written: what has no shape of its own, or would move its neighbours, is shown as a code.

const UNUSUAL = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}]|(?![ \u3000])\p{Zs}|^\p{M}/u;
const PIECES = new RegExp([
  "\\p{Extended_Pictographic}(?:\\ufe0f|\\p{Emoji_Modifier})?(?:\\u200d\\p{Extended_Pictographic}(?:\\ufe0f|\\p{Emoji_Modifier})?)*",
  "[0-9#*]\\ufe0f?\\u20e3", "[\\s\\S]"].join("|"), "gu");
const HIDDEN = /^(?:[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}]|(?![ \u3000])\p{Zs})$/u;

function code(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

function glyphs(text, spaces) {
  // [kind, text] in order; kinds: text, line, tab, space, code
  const found = [];
  const plain = (piece) => {
    if (found.length && found[found.length - 1][0] === "text") found[found.length - 1][1] += piece;
    else found.push(["text", piece]);
  };
  for (const [piece] of text.matchAll(PIECES)) {
    if (piece === "\n") found.push(["line", "↵"]);
    else if (piece === "\t") found.push(["tab", "→"]);
    else if (piece === " " && spaces) found.push(["space", " "]);
    else if (HIDDEN.test(piece)) found.push(["code", code(piece)]);
    else if (!found.length && /^\p{M}$/u.test(piece)) plain(`◌${piece}`);
    else plain(piece);
  }
  return found;
}

function write(node, text, spaces = false) {
  // fill a node with a token's text as it flows: a line mark is followed by the line's real end
  if (!UNUSUAL.test(text) && !(spaces && text.includes(" "))) {
    node.textContent = text;
    return;
  }
  node.replaceChildren();
  for (const [kind, piece] of glyphs(text, spaces)) {
    if (kind === "text") node.append(piece);
    else if (kind === "line") node.append(make("i", "mark", piece), "\n");
    else if (kind === "tab") node.append(make("i", "mark", piece), "\t");
    else node.append(make("i", kind === "space" ? "space" : "code", piece));
  }
}

function quoted(text, empty = "(empty)") {
  // a token on one line, with its spaces visible
  const node = make("bdi", "quoted");
  if (!text) {
    node.append(make("i", "soft", empty));
    return node;
  }
  for (const [kind, piece] of glyphs(text, true)) {
    if (kind === "text") node.append(piece);
    else node.append(make("i", kind === "code" ? "code" : "mark", kind === "space" ? "␣" : piece));
  }
  return node;
}

function spoken(text) {
  // for labels that are read aloud, or stand in a title
  return glyphs(text, true).map(([kind, piece]) => (kind === "text" ? piece : kind === "space" ? " " : kind === "line" ? " newline "
    : kind === "tab" ? " tab " : ` ${piece} `)).join("").trim() || (text ? "space" : "empty");
}
