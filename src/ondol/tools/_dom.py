"""JavaScript that reads a page: its text, and the elements that can be acted on, numbered."""

#: options {root, dense, most} -> {data: {lines, elements: [{role, name, value, looks, box}]}, nodes}
READ = r"""
({root, dense, most, skip}) => {
  const lines = [], elements = [], nodes = [], named = new Set();
  const start = document.querySelector(root) || document.body || document.documentElement;
  const squash = (t) => (t || "").replace(/\s+/g, " ").trim();
  const ROLES = {A: "link", BUTTON: "button", SELECT: "combobox", TEXTAREA: "textarea", SUMMARY: "button", IMG: "image"};
  const INPUTS = {checkbox: "checkbox", radio: "radio", button: "button", submit: "button", reset: "button",
                  image: "button", range: "slider", number: "spinbutton", search: "searchbox"};
  const SHAPES = new Set(["rect", "circle", "ellipse", "polygon", "polyline", "path", "line", "text"]);
  const ACTIVE = new Set(["button", "link", "tab", "checkbox", "radio", "menuitem", "option", "switch", "textbox",
                          "combobox", "slider", "spinbutton", "searchbox", "treeitem"]);
  let line = "", size = 0;  // characters read: no page is so long that it fills the memory
  const flush = () => { const text = squash(line); if (text) lines.push(text); line = ""; };
  const own = (e) => squash([...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(" "));
  const tag = (e) => e.tagName.toLowerCase();

  const role = (e) => {
    const said = squash(e.getAttribute("role")).split(" ")[0];
    if (said && said !== "presentation" && said !== "none") return said;
    if (e.tagName === "INPUT") return INPUTS[e.type] || (e.type === "text" ? "textbox" : e.type + " box");
    return ROLES[e.tagName] || (e.isContentEditable ? "textbox" : tag(e));
  };
  const active = (e, style) => {
    if (e.tagName === "INPUT") return e.type !== "hidden";
    if (e.tagName === "A") return e.hasAttribute("href") || e.hasAttribute("onclick") || style.cursor === "pointer";
    if (["BUTTON", "SELECT", "TEXTAREA", "SUMMARY"].includes(e.tagName) || ACTIVE.has(e.getAttribute("role"))) return true;
    if (e.hasAttribute("onclick") || e.getAttribute("contenteditable") === "true" || e.tabIndex >= 0) return true;
    const up = e.parentElement;
    return style.cursor === "pointer" && !(up && getComputedStyle(up).cursor === "pointer");
  };
  const name = (e) => {
    const said = squash(e.getAttribute("aria-label"));
    if (said) return said;
    if (e.labels && e.labels.length) {
      named.add(e.labels[0]);
      const text = squash(e.labels[0].textContent);
      if (text) return text;
    }
    if (e.tagName === "INPUT" && ["button", "submit", "reset"].includes(e.type)) return squash(e.value) || e.type;
    if (["INPUT", "TEXTAREA", "SELECT", "IMG"].includes(e.tagName))
      return squash(e.placeholder || e.alt || e.title || (dense ? e.id : e.name));
    return squash(e.innerText === undefined ? e.textContent : e.innerText).slice(0, 200) || squash(e.title);
  };
  const value = (e) => {
    if (e.tagName === "INPUT") {
      if (["checkbox", "radio"].includes(e.type)) return e.checked ? "on" : "off";
      if (["button", "submit", "reset", "image"].includes(e.type)) return null;
      return JSON.stringify(e.type === "password" ? "*".repeat(Math.min(99, e.value.length)) : e.value.slice(0, 2000));
    }
    if (e.tagName === "TEXTAREA") return JSON.stringify(e.value.slice(0, 2000));
    if (e.tagName === "SELECT") {
      const options = [...e.options].map((o) => squash(o.text));
      const shown = options.length > 40 ? [...options.slice(0, 40), "..."] : options;
      const chosen = [...e.selectedOptions].map((o) => squash(o.text)).join(", ");
      return JSON.stringify(chosen) + " of " + shown.map((o) => JSON.stringify(o)).join(", ");
    }
    for (const [state, words] of [["aria-checked", ["on", "off"]], ["aria-selected", ["selected", null]],
                                  ["aria-expanded", ["open", "closed"]]]) {
      if (e.hasAttribute(state)) return words[e.getAttribute(state) === "true" ? 0 : 1];
    }
    return null;
  };
  const looks = (e, style, box) => {  // what tells elements without a text from each other
    const out = [];
    if (e.id) out.push("id=" + e.id);
    const kind = typeof e.className === "string" ? e.className : e.getAttribute("class") || "";
    if (squash(kind)) out.push("class=" + squash(kind).split(" ").slice(0, 3).join("."));
    const fill = e.namespaceURI.endsWith("svg") ? style.fill : style.backgroundColor;
    if (fill && !/^(none|rgba\(0, 0, 0, 0\))$/.test(fill)) out.push(fill.replace(/, /g, ","));
    out.push(`${Math.round(box.width)}x${Math.round(box.height)} at ${Math.round(box.left)},${Math.round(box.top)}`);
    return out.join(" ");
  };
  const add = (e, style, box, said) => {
    flush();
    const entry = {role: role(e), name: said, value: value(e), looks: "",
                   box: [box.left, box.top, box.right, box.bottom].map(Math.round)};
    const shape = e.namespaceURI.endsWith("svg");
    if (dense && (shape || !entry.name)) entry.looks = looks(e, style, box);
    nodes.push(e);
    elements.push(entry);
    lines.push(nodes.length);
  };
  const walk = (node) => {
    if (node.nodeType === 3) {
      if (!named.has(node.parentElement && node.parentElement.closest("label"))) line += node.data.slice(0, 20000);
      size += node.data.length;
      return;
    }
    if (node.nodeType !== 1 || nodes.length >= most || size > 200000) return;
    if (["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE", "HEAD", "OPTION"].includes(node.tagName)) return;
    if (skip && node.matches(skip)) return;
    const style = getComputedStyle(node);
    if (style.display === "none") return;
    if (node.tagName === "LABEL" && node.control && node.control.getBoundingClientRect().width) named.add(node);
    if (node.tagName === "BR") return flush();
    const box = node.getBoundingClientRect(), block = !style.display.startsWith("inline") && style.display !== "contents";
    const seen = style.visibility !== "hidden" && style.opacity !== "0" && box.width > 0 && box.height > 0;
    const children = node.shadowRoot ? [...node.shadowRoot.childNodes] : [...node.childNodes];
    if (block) flush();
    if (seen && active(node, style)) {
      const inner = [...node.querySelectorAll("*")].some((c) => active(c, getComputedStyle(c)));
      add(node, style, box, inner ? "" : name(node));
      if (inner) children.forEach(walk);
      if (block) flush();
      return;
    }
    if (seen && dense) {
      const text = own(node);
      const leaf = !node.children.length;
      if (SHAPES.has(tag(node)) || node.tagName === "CANVAS" || node.tagName === "IMG" || (leaf && !text)) {
        return add(node, style, box, text || (node.tagName === "IMG" ? name(node) : ""));
      }
      if (text && !named.has(node.closest("label"))) {
        add(node, style, box, text);
        [...node.children].forEach(walk);
        return;
      }
      [...node.children].forEach(walk);
      return;
    }
    if (node.tagName === "IMG" && seen && name(node)) line += ` (image: ${name(node)}) `;
    children.forEach((child) => { if (child.nodeType !== 3 || style.visibility !== "hidden") walk(child); });
    if (block) flush();
  };
  walk(start);
  flush();
  return {
    data: {lines, elements},
    nodes,
  };
}
"""

#: a place [x, y] where an element is on top of others: its middle, or the first of a grid; null where it has no size
PLACE = r"""
(e) => {
  e.scrollIntoViewIfNeeded ? e.scrollIntoViewIfNeeded() : e.scrollIntoView();
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height) return null;
  const places = [[0.5, 0.5]];
  for (const y of [0.5, 0.25, 0.75, 0.1, 0.9]) for (const x of [0.5, 0.25, 0.75, 0.1, 0.9]) places.push([x, y]);
  for (const [x, y] of places) {
    const at = [box.left + x * box.width, box.top + y * box.height], top = document.elementFromPoint(...at);
    if (top && (top === e || e.contains(top) || (e.labels && [...e.labels].some((l) => l === top)))) return at;
  }
  return [box.left + box.width / 2, box.top + box.height / 2];
}
"""
