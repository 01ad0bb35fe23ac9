// A small Markdown. It makes elements and text nodes only, never HTML from text, so nothing in a text can become a tag,
// an attribute or a script; links lead to http, https and mailto only, and nothing is loaded.

const MAX_DEPTH = 8;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

export function renderMarkdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const made = document.createDocumentFragment();
  if (depth > MAX_DEPTH) {
    made.append(element("p", lines.join("\n")));
    return made;
  }
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let match;
    if (!line.trim()) i++;
    else if ((match = FENCE.exec(line))) i = fence(lines, i, match, made);
    else if ((match = /^(#{1,6})\s+(.*)$/.exec(line))) {
      made.append(element(`h${match[1].length}`, inline(match[2], 0)));
      i++;
    } else if (/^\s*([-*_])\s*(\1\s*){2,}$/.test(line)) {
      made.append(element("hr"));
      i++;
    } else if (/^\s*>/.test(line)) {
      const end = endOf(lines, i, (next) => /^\s*>/.test(next));
      made.append(element("blockquote", blocks(lines.slice(i, end).map((l) => l.replace(/^\s*> ?/, "")), depth + 1)));
      i = end;
    } else if (ITEM.test(line)) i = list(lines, i, made, depth);
    else if (line.includes("|") && DELIMITERS.test(lines[i + 1] ?? "")) i = table(lines, i, made);
    else {
      const end = endOf(lines, i + 1, (next) => next.trim() && !startsBlock(next));
      made.append(element("p", inline(lines.slice(i, end).join("\n"), 0)));
      i = end;
    }
  }
  return made;
}

const startsBlock = (line) => FENCE.test(line) || ITEM.test(line) || /^(#{1,6}\s|\s*>)/.test(line);

function endOf(lines, start, belongs) {
  let end = start;
  while (end < lines.length && belongs(lines[end])) end++;
  return end;
}

// Up to a line of at least as many of the same characters, or the end: the answer may still be coming.
function fence(lines, start, [, marks], made) {
  const closes = (line) => line.trim().length >= marks.length && line.trim() === marks[0].repeat(line.trim().length);
  const end = endOf(lines, start + 1, (line) => !closes(line));
  made.append(element("pre", element("code", lines.slice(start + 1, end).join("\n"))));
  return end + 1;
}

function list(lines, start, made, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const isOrdered = /\d/.test(mark);
  const of = element(isOrdered ? "ol" : "ul");
  if (isOrdered) of.start = parseInt(mark, 10);
  let i = start;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length > indent.length + 1 || /\d/.test(match[2]) !== isOrdered) break;
    const inner = (line) => !line.trim() || line.length - line.trimStart().length > indent.length + 1;
    let end = endOf(lines, i + 1, inner);
    const content = [match[3], ...lines.slice(i + 1, end).map((l) => l.slice(indent.length + 2))];
    while (content.length > 1 && !content.at(-1).trim()) content.pop();
    of.append(element("li", content.length > 1 ? blocks(content, depth + 1) : inline(match[3], 0)));
    i = end;
  }
  made.append(of);
  return i;
}

function table(lines, start, made) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((text) => text.trim());
  const row = (line, tag) => element("tr", ...cells(line).map((text) => element(tag, inline(text, 0))));
  const end = endOf(lines, start + 2, (line) => line.includes("|"));
  const body = lines.slice(start + 2, end).map((line) => row(line, "td"));
  made.append(element("table", element("thead", row(lines[start], "th")), element("tbody", ...body)));
  return end;
}

// ------------------------------------------------------------------------------------------ inline

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

function inline(text, depth) {
  const made = document.createDocumentFragment();
  const ended = new Set(); // marks that are not in the rest of the text: each is looked for once
  let plain = "";
  const find = (mark, from) => {
    const at = ended.has(mark) ? -1 : text.indexOf(mark, from);
    if (at < 0) ended.add(mark);
    return at;
  };
  const put = (node, end) => {
    made.append(plain, node);
    plain = "";
    return end;
  };
  for (let i = 0; i < text.length; ) {
    const next = depth < MAX_DEPTH ? special(text, i, find, depth) : null;
    if (next) i = put(next.node, next.end);
    else if (text[i] === "\n") i = put(element("br"), i + 1);
    else if (text[i] === "\\" && /[\\`*_~[\]()#>|.!+-]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else plain += text[i++];
  }
  made.append(plain);
  return made;
}

function special(text, i, find, depth) {
  const char = text[i];
  if (char === "`") return code(text, i, find);
  if (char === "[") return link(text, i, find, depth);
  if (char === "h" && /^https?:\/\//.test(text.slice(i, i + 8))) return bareLink(text, i);
  if (char === "*" || char === "_" || char === "~") return emphasis(text, i, find, depth);
  return null;
}

function code(text, i, find) {
  let length = 1;
  while (text[i + length] === "`" && length < 8) length++;
  const mark = "`".repeat(length);
  const end = find(mark, i + length);
  if (end < 0) return null;
  return { node: element("code", text.slice(i + length, end)), end: end + length };
}

function emphasis(text, i, find, depth) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, i) || /\s/.test(text[i + mark.length] ?? " ")) continue;
    if (mark[0] === "_" && /\w/.test(text[i - 1] ?? "")) continue; // snake_case
    const end = find(mark, i + mark.length + 1);
    if (end < 0 || /\s/.test(text[end - 1]) || (mark[0] === "_" && /\w/.test(text[end + mark.length] ?? ""))) continue;
    return { node: element(tag, inline(text.slice(i + mark.length, end), depth + 1)), end: end + mark.length };
  }
  return null;
}

function link(text, i, find, depth) {
  const middle = find("](", i + 1);
  const end = middle < 0 ? -1 : find(")", middle + 2);
  if (end < 0 || end - i > 4000) return null;
  const address = safeAddress(text.slice(middle + 2, end).trim());
  if (!address) return null;
  return { node: anchor(address, inline(text.slice(i + 1, middle), depth + 1)), end: end + 1 };
}

function bareLink(text, i) {
  const match = /^https?:\/\/[^\s<>"'`)\]]+/.exec(text.slice(i, i + 2000));
  const shown = match?.[0].replace(/[.,;:!?*_]+$/, "");
  const address = shown && safeAddress(shown);
  return address ? { node: anchor(address, shown), end: i + shown.length } : null;
}

function safeAddress(text) {
  try {
    const { protocol, href } = new URL(text); // absolute ones only
    return ["http:", "https:", "mailto:"].includes(protocol) ? href : null;
  } catch {
    return null;
  }
}

function anchor(address, content) {
  const made = element("a", content);
  made.href = address;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  made.title = address;
  return made;
}
