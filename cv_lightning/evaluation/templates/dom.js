// Small building blocks. Text is only ever set as text: nothing that a model wrote is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element: `props` are attributes, except class, text and on (event handlers); children may be null. */
function make(tag, props = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** An element with a class and nothing else to say about itself. */
const put = (tag, name, ...children) => make(tag, { class: name }, ...children);

const words = (text) => String(text).replaceAll("_", " ");
const sizeText = (size) => (size ? `${size[0]}×${size[1]}` : "?");

/** A number in few characters. */
function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return String(+value.toPrecision(size >= 1000 ? 4 : 3));
}

let pixels = null; // parsed when the first picture is looked at
const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    waiting.unobserve(entry.target);
    pixels ??= JSON.parse(byId("images").textContent);
    entry.target.src = pixels[entry.target.dataset.file];
  }
}, { rootMargin: "300px" });
const embedded = (file) => {
  pixels ??= JSON.parse(byId("images").textContent);
  return Object.hasOwn(pixels, file);
};

/** A picture that is decoded when it comes into view. */
function picture(image, alt) {
  const [width, height] = image.size;
  const node = make("img", { class: "pic", alt, width, height, decoding: "async", "data-file": image.file });
  if (Math.max(width, height) <= 128) node.classList.add("pixelated");
  waiting.observe(node);
  return node;
}

/** The picture, linked to its file where the page stands in the run's folder. */
function linkedPicture(image, alt, folder) {
  const link = folder === null || !image.file ? null : `${encodeURI(folder)}/images/${encodeURIComponent(image.file)}`;
  if (!embedded(image.file)) {
    const file = link && make("a", { href: link, target: "_blank", text: "Open its file" });
    return put("p", "note", "Picture not embedded. ", file);
  }
  const node = picture(image, alt);
  return link ? make("a", { href: link, target: "_blank", title: "open the whole picture" }, node) : node;
}
