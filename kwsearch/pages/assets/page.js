"use strict";
// Tables that sort and filter, marks that say what they are, buttons that copy.

const tip = document.getElementById("tip");

function say(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const wide = document.documentElement.clientWidth;
  tip.style.left = Math.max(4, Math.min(x + 12, wide - tip.offsetWidth - 4) + scrollX) + "px";
  tip.style.top = y + 14 + scrollY + "px";
}

// What a mark is: of the row that it leads to the cells of marked columns, and the row's text.
function meaning(link) {
  const row = document.getElementById(link.getAttribute("href").slice(1));
  if (!row) return "";
  const heads = row.cells ? [...row.closest("table").tHead.rows].at(-1).cells : [];
  const said = [...heads].map((head, i) => [head.dataset.tip, row.cells[i].textContent.trim()])
    .filter(([title, text]) => title !== undefined && text)
    .map(([title, text]) => `${title} ${text}`);
  return [...said, row.dataset.tip].filter(Boolean).join("\n");
}

for (const link of document.querySelectorAll("svg a")) {
  link.setAttribute("tabindex", "-1"); // there may be thousands; the table has the same
  const show = (event) => {
    const box = link.getBoundingClientRect();
    const text = meaning(link);
    if (text) say(text, event.clientX || box.right, event.clientY || box.bottom);
  };
  link.addEventListener("mouseenter", show);
  link.addEventListener("mousemove", show);
  link.addEventListener("mouseleave", () => { tip.hidden = true; });
}

// A filter ends when somebody asks for a row that it hides.
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link) return;
  tip.hidden = true;
  const row = document.getElementById(link.getAttribute("href").slice(1));
  if (!row || !row.hidden) return;
  const table = row.closest("table");
  for (const field of fieldsOf(document.querySelector(`.tools[data-table="${table.id}"]`))) {
    set(field, "");
  }
});

function fieldsOf(tools) {
  return [...tools.querySelectorAll("input, select")];
}

function set(field, value) {
  field.value = value;
  field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input"));
}

function value(row, column) {
  const cell = row.cells[column];
  const raw = cell.dataset.v ?? cell.textContent.trim();
  // 12,800,000 and 82.51 % are numbers, too.
  const number = Number(/^-?[\d,]+(\.\d+)?( %)?$/.test(raw) ? raw.replace(/[, %]/g, "") : raw);
  return raw === "" ? null : isNaN(number) ? raw : number;
}

// What has no value is last in either direction.
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows];
    const key = new Map(rows.map((row) => [row, value(row, head.cellIndex)]));
    rows.sort((a, b) => compare(key.get(a), key.get(b), down ? -1 : 1));
    body.append(...rows);
  });
}

for (const tools of document.querySelectorAll(".tools[data-table]")) {
  const body = document.getElementById(tools.dataset.table).tBodies[0];
  const [text, kind, count] = ["input", "select", "output"].map((tag) => tools.querySelector(tag));
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const said = row.textContent.toLowerCase();
      const fits = words.every((word) => said.includes(word));
      row.hidden = !(fits && (!kind.value || row.dataset.state === kind.value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${body.rows.length}`;
  };
  text.addEventListener("input", filter);
  kind.addEventListener("change", filter);
  filter();
}

// A button in each row of a trial that has a plan: its recipe, or the command that writes it.
for (const table of document.querySelectorAll("table[data-command]")) {
  const kept = new Set(table.dataset.kept.split(" "));
  for (const row of table.tBodies[0].rows) {
    if (row.dataset.bare !== undefined) continue;
    const number = row.id.slice(1);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kept.has(number) ? "copy" : "copy command";
    if (kept.has(number)) button.dataset.recipe = number;
    else button.dataset.copy = table.dataset.command.replaceAll("{}", number);
    button.setAttribute("aria-label", `${button.textContent}: recipe of trial ${number}`);
    row.cells[1].append(button);
  }
}

// Recipes are compressed together: whoever wants one has all of them unpacked.
let recipes = null;

async function unpacked() {
  if (recipes === null) {
    const packed = document.getElementById("recipes").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    recipes = JSON.parse(await new Response(stream).text());
  }
  return recipes;
}

async function put(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // a file is no secure context everywhere
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not let a page copy");
}

let hiding;
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy], button[data-recipe]");
  if (!button) return;
  const box = button.getBoundingClientRect();
  try {
    const text = button.dataset.copy ?? (await unpacked())[button.dataset.recipe];
    await put(text);
    say("copied", box.right, box.top);
  } catch (error) {
    say(`not copied: ${error.message}`, box.right, box.top);
  }
  clearTimeout(hiding);
  hiding = setTimeout(() => { tip.hidden = true; }, 2000);
});

// While a study runs its page is written anew: it is loaded again, and looks as it did.
const again = document.getElementById("again");
const remembered = `kwsearch ${location.pathname}`;
const filters = [...document.querySelectorAll(".tools[data-table]")].flatMap(fieldsOf);
const folded = [...document.querySelectorAll("details")];

function remember() {
  const sorted = [...document.querySelectorAll("th[aria-sort]")].map((head) =>
    [head.closest("table").id, head.textContent, head.getAttribute("aria-sort")]);
  const values = filters.map((field) => field.value);
  sessionStorage.setItem(remembered,
    JSON.stringify({ sorted, values, open: folded.map((one) => one.open) }));
}

function recall() {
  const text = sessionStorage.getItem(remembered);
  if (text === null) return;
  sessionStorage.removeItem(remembered);
  const { sorted, values, open } = JSON.parse(text);
  filters.forEach((field, i) => { if (values[i]) set(field, values[i]); });
  folded.forEach((one, i) => { one.open = Boolean(open[i]); });
  for (const [id, title, order] of sorted) {
    const heads = [...(document.getElementById(id)?.querySelectorAll("thead th") ?? [])];
    const button = heads.find((head) => head.textContent === title)?.querySelector("button");
    if (!button) continue;
    button.click();
    if (order === "descending") button.click();
  }
}

try {
  recall();
} catch (error) {
  console.warn(`what was filtered and sorted is not known any more: ${error.message}`);
}

if (again) {
  setInterval(() => {
    const busy = document.querySelector("main :focus-visible") || !getSelection().isCollapsed;
    if (!again.checked || busy) return;
    try {
      remember();
    } catch { /* a browser that keeps nothing */ }
    location.reload();
  }, 1000 * Number(again.dataset.every));
}
