// Builds the list of clips. Captions, references and names are foreign text: they only ever become text nodes.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("clips");
const order = document.getElementById("order");
const search = document.getElementById("search");

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// The attention of one query over the frames: white over what it does not read; each query by its own maximum.
function draw(canvas, clip, block, query) {
  const [, queries, frames, rows, columns] = clip.shape;
  if (!clip.bytes) clip.bytes = Uint8Array.from(atob(clip.attention), (letter) => letter.charCodeAt(0));
  canvas.width = frames * columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, rows);
  const start = (block * queries + query) * frames * rows * columns;
  for (let frame = 0; frame < frames; frame++)
    for (let y = 0; y < rows; y++)
      for (let x = 0; x < columns; x++) {
        const value = clip.bytes[start + (frame * rows + y) * columns + x];
        image.data.set([255, 255, 255, 0.75 * (255 - value)], 4 * (y * canvas.width + frame * columns + x));
      }
  context.putImageData(image, 0, 0);
}

function queryButtons(clip, canvas) {
  const rows = [];
  for (let block = 0; block < clip.shape[0]; block++) {
    const row = element("div", "block");
    row.append(element("span", "", "block " + (data.first + block)));
    for (let query = 0; query < clip.shape[1]; query++) {
      const button = element("button", "", query + 1), gate = clip.gates[block][query];
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.style.setProperty("--gate", gate);
      button.title = `query ${query + 1} after block ${data.first + block}, gate ${gate.toFixed(2)}`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => {
        const wasOn = button.getAttribute("aria-pressed") === "true";
        for (const other of row.parentNode.querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(!wasOn));
        if (wasOn) canvas.width = 0;
        else draw(canvas, clip, block, query);
      });
      row.append(button);
    }
    rows.push(row);
  }
  return rows;
}

function card(clip) {
  const node = element("article", ""), strip = element("div", "strip"), image = element("img", "");
  const scroller = element("div", "scroller");
  image.src = clip.strip;
  image.alt = "frames of " + clip.id;
  strip.style.setProperty("--aspect", clip.aspect);
  strip.append(image);
  scroller.append(strip);
  node.append(scroller, element("p", "caption", clip.caption));
  const scores = Object.entries(clip.scores).map(([name, value]) => `${name} ${(100 * value).toFixed(1)}`);
  node.append(element("div", "numbers", [clip.id, ...scores].join("  ·  ")));
  for (const reference of clip.references.slice(0, 3)) node.append(element("p", "reference", reference));
  if (clip.references.length > 3) {
    const more = element("details", "reference");
    more.append(element("summary", "", `${clip.references.length - 3} more references`));
    for (const reference of clip.references.slice(3)) more.append(element("p", "reference", reference));
    node.append(more);
  }
  if (clip.attention) {
    const canvas = element("canvas", "");
    canvas.width = 0;
    canvas.style.imageRendering = "pixelated";
    strip.append(canvas);
    node.append(...queryButtons(clip, canvas));
  }
  return node;
}

function show() {
  const [name, direction] = order.value.split("|"), word = search.value.trim().toLowerCase();
  const chosen = data.clips.filter((clip) => clip.text.includes(word));
  if (name) chosen.sort((a, b) => direction * (a.scores[name] - b.scores[name]));
  for (const clip of chosen) clip.node ??= card(clip);
  list.replaceChildren(...chosen.map((clip) => clip.node));
  document.getElementById("count").textContent = `${chosen.length} of ${data.clips.length} clips`;
}

for (const clip of data.clips) clip.text = [clip.id, clip.caption, ...clip.references].join("\n").toLowerCase();
for (const name of data.sortable) {
  order.append(new Option(`${name}, worst first`, `${name}|1`), new Option(`${name}, best first`, `${name}|-1`));
}
order.append(new Option("in their order", "|1"));
document.getElementById("hint").hidden = !data.clips.some((clip) => clip.attention);
order.addEventListener("change", show);
search.addEventListener("input", show);
document.getElementById("tools").addEventListener("submit", (event) => event.preventDefault());

show();
