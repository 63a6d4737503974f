// Building blocks. Text is set as text only, so that nothing that a model wrote is parsed as HTML.
let data = JSON.parse(document.getElementById("data").textContent);
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

/** An element with a class and children. */
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

let pixels = null; // parsed when the first image is shown
const embedded = (file) => {
  pixels ??= JSON.parse(byId("images").textContent);
  return Object.hasOwn(pixels, file);
};
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    waiting.unobserve(target);
    target.src = target.dataset.url ?? pixels[target.dataset.file];
  }
}, { rootMargin: "300px" });

/** URL of an image file in the run's folder; null where the page cannot reach it. */
const fileUrl = (file, folder) => (folder === null || !file ? null
  : `${encodeURI(folder ? `${folder}/` : "")}images/${encodeURIComponent(file)}`);

/** URL of an image at the size that the model saw; null without a server. */
function seenUrl(image, folder) {
  const url = data.live ? fileUrl(image.file, folder) : null;
  return url && `${url}?size=${image.model.join("x")}`;
}

const noImage = (text) => put("span", "pic none", text);

/** An image that is loaded when it comes into view: from the page, else from the run's folder. */
function imageNode(image, alt, folder, key = image.file) {
  const [width, height] = key === image.file ? image.size : image.model;
  const inside = embedded(key);
  const url = inside ? null : key === image.file ? fileUrl(image.file, folder) : seenUrl(image, folder);
  if (!inside && !url) return noImage(image.missing ? "image missing in the run" : "image not on this page");
  const node = make("img", {
    class: Math.max(width, height) <= 128 ? "pic pixelated" : "pic",
    alt, width, height, decoding: "async", "data-file": key, "data-url": url,
  });
  node.addEventListener("error", () => node.replaceWith(noImage("image not found")), { once: true });
  waiting.observe(node);
  return node;
}

/** The image, with a link to its file if the page is in the run's folder. */
function linkedImage(image, alt, folder) {
  const node = imageNode(image, alt, folder);
  const link = fileUrl(image.file, folder);
  return link ? make("a", { href: link, target: "_blank", title: "open the image in full size" }, node) : node;
}
