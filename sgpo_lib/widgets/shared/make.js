// Stands above every widget's own files: the one way in which text gets into a page. It only ever becomes text nodes;
// no HTML is parsed. What has no shape, or could reorder its neighbours, is shown as a code (escaping.py does the same).

const UNSEEN = /(?![\n\t])[\p{Cc}\p{Zl}\p{Zp}\p{Cs}\p{Co}]|(?!(?<=[\p{Extended_Pictographic}\p{Emoji_Modifier}\ufe0f0-9#*])[\u200d\ufe0f])[\p{Cf}\p{Default_Ignorable_Code_Point}]/gu;

function readable(text) {
  return text.replace(UNSEEN, (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
}

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (typeof c === "string" ? readable(c) : c)));
  return node;
}
