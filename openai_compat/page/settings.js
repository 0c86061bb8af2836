// What a person has chosen. It stays in this tab: the storage of a session ends with it. Only the theme outlives it.

export const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = ["system", "tools", ...NUMBERS];
const PREFIX = "microvllm."; // other programs may be served from the same address at other times
const $ = (id) => document.getElementById(id);

export function load(storage, name, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(PREFIX + name)) ?? otherwise;
  } catch { // the browser allows none
    return otherwise;
  }
}

export function save(storage, name, value) {
  try {
    window[storage].setItem(PREFIX + name, JSON.stringify(value));
  } catch { // none allowed, or the value is too long to keep
  }
}

export const settings = load("sessionStorage", "settings", {});
export const access = { key: load("sessionStorage", "key", "") };

function fill() {
  for (const name of FIELDS) $(name).value = settings[name] ?? "";
  $("key").value = access.key;
  checkTools();
}

function take(onKey) {
  for (const name of FIELDS) {
    const value = $(name).value.trim();
    if (value) settings[name] = NUMBERS.includes(name) ? Number(value) : value;
    else delete settings[name];
  }
  save("sessionStorage", "settings", settings);
  if ($("key").value.trim() === access.key) return;
  access.key = $("key").value.trim();
  save("sessionStorage", "key", access.key);
  onKey();
}

function checkTools() {
  let fine = !$("tools").value.trim();
  try {
    fine ||= Array.isArray(JSON.parse($("tools").value));
  } catch { // no JSON
  }
  $("tools").setCustomValidity(fine ? "" : "This is not a JSON list.");
}

export function askForKey() {
  $("key-row").hidden = false;
  if (!$("settings").open) $("settings").showModal();
  $("key").focus();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
}

// `onKey` is called with each new key.
export function setUp(onKey) {
  setTheme(load("localStorage", "theme", ""));
  $("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    save("localStorage", "theme", document.documentElement.dataset.theme);
  });
  $("open-settings").addEventListener("click", () => { fill(); $("settings").showModal(); });
  $("tools").addEventListener("input", checkTools);
  $("reset").addEventListener("click", () => { for (const name of FIELDS) $(name).value = ""; checkTools(); });
  $("settings").firstElementChild.addEventListener("submit", (event) => { // what is out of range keeps it open
    event.preventDefault();
    take(onKey);
    $("settings").close();
  });
  $("settings").addEventListener("close", fill); // Escape leaves everything as it was
}
