// Optional: pages work without it. Links and forms replace the page in place, and the address stays
// the search. Nothing is loaded from other sites.
"use strict";
const $ = (what, where = document) => where.querySelector(what);
const $$ = (what, where = document) => [...where.querySelectorAll(what)];
const announce = (text) => { $("#status").textContent = text; };
const texts = JSON.parse($("#texts").textContent);
// A text of the page in its language, with values for its %(name)s.
const _ = (text, values = {}) => (texts[text] || text).replace(/%\((\w+)\)s/g, (_whole, name) => values[name]);
const MOST_BYTES = 20 * 1024 * 1024;
let request = null;
let posting = Promise.resolve();
let resume = 0;  // Where arrows go on if the focused card is gone.

// A lost session leads to the login, and from there back.
async function load(address, options = {}, back = location.href) {
  const answer = await fetch(address, options);
  const isLogin = answer.redirected && new URL(answer.url).pathname === "/login" && !address.endsWith("/logout");
  if (answer.status !== 401 && !isLogin) return answer;
  const { pathname, search } = new URL(back, location.href);
  location.assign(`/login?next=${encodeURIComponent(pathname + search)}`);
  return new Promise(() => {});
}

// Pages in place.
function bones() {
  const cards = $("#cards");
  const results = $("#results");
  if (!results || cards) return;
  results.innerHTML = '<ol class="cards">' + '<li class="card"><span class="shot bone"></span></li>'.repeat(12) + "</ol>";
}

async function show(address, options = {}, keep = true) {
  for (const field of $$("[data-changed]")) delete field.dataset.changed;
  request?.abort();
  const own = (request = new AbortController());
  document.body.classList.add("busy");
  if (new URL(address, location.href).pathname === "/" && new URL(address, location.href).search) bones();
  let answer, text;
  try {
    const asked = { ...options, signal: own.signal, headers: { Accept: "text/html" } };
    answer = await load(address, asked, options.method ? location.href : address);
    text = await answer.text();
  } catch (error) {
    const failed = _("The server does not answer. Try again in a moment.");
    if (error.name !== "AbortError") announce(failed);
    if (error.name !== "AbortError") wrong(failed);
    return;
  } finally {
    if (own === request) document.body.classList.remove("busy");
  }
  if (own !== request) return;
  if (!(answer.headers.get("content-type") || "").startsWith("text/html")) {
    report(answer, text);
    return;
  }
  const page = new DOMParser().parseFromString(text, "text/html");
  if (keep && answer.url !== location.href) history.pushState({}, "", answer.url);
  if (!place(page) && keep) scrollTo(0, 0);
}

function report(answer, text) {
  let detail = text;
  try { detail = JSON.parse(text).detail; } catch { /* No JSON: shown as it is. */ }
  const wait = answer.headers.get("retry-after");
  wrong(detail + (wait ? ` (${wait} s)` : ""));
}

function wrong(text) {
  let note = $("#wrong");
  if (!note) {
    note = document.createElement("p");
    note.id = "wrong";
    note.className = "note wrong";
    note.setAttribute("role", "alert");
    $("main").prepend(note);
  }
  note.textContent = text;
}

function place(page) {
  const was = document.activeElement;
  const isChoice = was?.matches?.("button, [type=radio], [type=checkbox]");
  const held = was?.name ? `[name="${was.name}"]${isChoice ? `[value="${CSS.escape(was.value)}"]` : ""}` : null;
  const card = was?.closest?.(".card");
  if (card) resume = $$(".cards > .card").indexOf(card);
  const open = $("#filters")?.checked;
  document.title = page.title;
  $("aside.purpose")?.remove();
  $("header.top").replaceWith(...[$("header.top", page), $("aside.purpose", page)].filter(Boolean));
  $("main").replaceWith($("main", page));
  if (open && $("#filters")) $("#filters").checked = true;
  begin();
  const again = card?.id && document.getElementById(card.id);
  const focused = (held && $(held, again || document)) || (again && $(".open", again)) || null;
  focused?.focus({ preventScroll: !again });
  const found = $$("#cards > .card").length;
  const verdict = $(".results > .verdict")?.textContent.trim() || "";
  announce($(".message h1")?.textContent || (found ? `${_("Shown: %(count)s.", { count: found })} ${verdict}` : document.title));
  return again;
}

// A half-typed time has no value: said, not left out.
function isTyped(form) {
  const half = [...form.elements].find((one) => one.type === "datetime-local" && !one.validity.valid);
  if (half) wrong(half.validationMessage);
  return !half;
}

function addressOf(form) {
  const pairs = new URLSearchParams();
  const hasLast = new FormData(form).get("last");
  for (const [name, value] of new FormData(form)) {
    if (typeof value !== "string" || !value.trim()) continue;
    if (hasLast && (name === "since" || name === "until")) continue;
    if ((name === "order" && value === "match") || (name === "by" && value === "track")) continue;
    if (name === "share" && value === "0.5") continue;
    if (name === "zone" && !pairs.has("since") && !pairs.has("until")) continue;
    pairs.append(name, value);
  }
  const text = pairs.toString();
  return text ? `/?${text}` : "/";
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  const button = event.submitter;
  if (form.hasAttribute("data-plain") || button?.hasAttribute("data-plain") || form.id === "picture-form") return;
  event.preventDefault();
  const action = (button?.hasAttribute("formaction") ? button.formAction : form.getAttribute("action")).split("?")[0];
  const body = new FormData(form, button);
  if ((button?.formMethod || form.method) === "get") {
    show(form.id === "search-form" ? addressOf(form) : `${action}?${new URLSearchParams(body)}`);
  } else {
    const sent = { method: "POST", body: new URLSearchParams(body) };
    posting = posting.then(() => show(action, sent));  // In their order: a later mark aborts none.
  }
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button || link.target || link.hasAttribute("download")) return;
  const address = new URL(link.href.baseVal ?? link.href, location.href);
  if (address.origin !== location.origin || address.hash || address.pathname.startsWith("/api/")) return;
  event.preventDefault();
  if (link.id === "more") more(link);
  else show(address.href);
});

addEventListener("popstate", () => show(location.href, {}, false));

document.addEventListener("change", (event) => {
  const field = event.target;
  if (field.matches(".select")) {
    const chosen = $$(".select:checked");
    const pictures = chosen.reduce((sum, one) => sum + Number(one.dataset.pictures), 0);
    const shown = (count) => count.toLocaleString(document.documentElement.lang);
    $("#selected strong").textContent = _("Selected cards: %(cards)s, pictures: %(pictures)s", { cards: shown(chosen.length), pictures: shown(pictures) });
  }
  if (field.id === "file") {
    if (field.files[0]) sendPicture(field.files[0]);
  } else if (field.form?.id === "search-form" && field.id !== "q") {
    if (field.type !== "datetime-local") return isTyped(field.form) && show(addressOf(field.form));
    field.dataset.changed = "";  // With each part that is typed: applied below.
    if (field.value) $('input[name="last"][value=""]').checked = true;
  }
});

document.addEventListener("focusout", (event) => {
  const next = event.relatedTarget;
  if (event.target.type !== "datetime-local" || next?.type === "datetime-local" || next?.matches("a, button")) return;
  const form = $("#search-form");
  if (event.target.form !== form || (event.target.validity.valid && !$("[data-changed]"))) return;
  if (isTyped(form)) show(addressOf(form));
});

// More hits below those that are there.
async function more(link) {
  if (link.dataset.waits) return;
  link.dataset.waits = "1";
  link.textContent = _("Loading …");
  try {
    const answer = await load(link.href);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const cards = $$("#cards > .card", page);
    if (!cards.length) throw new Error($(".message p", page)?.textContent || _("no answer"));
    $("#cards").append(...cards);
    if ($("#shown")) $("#shown").textContent = $$("#cards > .card").length;
    const next = $("#more", page);
    if (next) link.closest("p").replaceWith(next.closest("p"));
    else link.closest("p").replaceWith($(".end", page));
    const button = $("#more");
    if (button) watchMore(button);
    cards[0].querySelector(".open").focus({ preventScroll: true });
  } catch (error) {
    link.textContent = _("Show more");
    delete link.dataset.waits;
    wrong(_("More could not be loaded: %(why)s", { why: error.message }));
  }
}

let seen = null;
function watchMore(link) {
  seen?.disconnect();
  seen = new IntersectionObserver((entries) => { if (entries.some((one) => one.isIntersecting)) more(link); }, { rootMargin: "200px" });
  addEventListener("scroll", () => link.isConnected && seen.observe(link), { once: true, passive: true });
}

// A picture to search with: chosen, dropped or pasted.
function sendPicture(file) {
  if (!file.type.startsWith("image/")) return wrong(_("%(name)s is no picture.", { name: file.name }));
  if (file.size > MOST_BYTES - 4096) return wrong(_("%(name)s is larger than 20 MiB: choose a smaller picture.", { name: file.name }));
  const body = new FormData($("#picture-form"));
  body.set("picture", file);
  if ($("#q")) {
    if (!isTyped($("#search-form"))) return;
    const address = new URLSearchParams(addressOf($("#search-form")).slice(2));
    body.set("address", address.toString());
  }
  return show("/picture", { method: "POST", body });
}
let inside = 0;
addEventListener("dragenter", (event) => { if ($("#picture-form") && event.dataTransfer?.types.includes("Files")) { inside += 1; document.body.classList.add("dropping"); } });
addEventListener("dragleave", () => { inside = Math.max(0, inside - 1); if (!inside) document.body.classList.remove("dropping"); });
addEventListener("dragover", (event) => { if ($("#picture-form")) event.preventDefault(); });
addEventListener("drop", (event) => {
  inside = 0;
  document.body.classList.remove("dropping");
  if (!$("#picture-form")) return;
  event.preventDefault();
  if (event.dataTransfer.files[0]) sendPicture(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => { if ($("#picture-form") && event.clipboardData.files[0]) { event.preventDefault(); sendPicture(event.clipboardData.files[0]); } });

// Keyboard.
addEventListener("keydown", (event) => {
  const target = event.target;
  const writes = target.matches?.("input, select, textarea");
  if (event.key === "/" && !writes && $("#q")) {
    event.preventDefault();
    $("#q").focus();
    $("#q").select();
    return;
  }
  if (event.key === "Escape" && target.id === "q") target.blur();
  const cards = $$(".cards .open");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const card = document.activeElement?.closest?.(".card");
  if ((event.key === "y" || event.key === "n") && !writes) {
    if (!event.repeat) (card || $(".about"))?.querySelector(`button[name="${event.key === "y" ? "yes" : "no"}"]`)?.click();
    return;
  }
  if (!cards.length) return;
  const at = cards.indexOf(card?.querySelector(".open"));
  if (writes && !(target.id === "q" && event.key === "ArrowDown")) return;
  const top = (card) => Math.round(card.getBoundingClientRect().top);
  const columns = cards.filter((card) => top(card) === top(cards[0])).length || 1;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (!step) return;
  const next = at < 0 ? cards[Math.min(resume, cards.length - 1)] : cards[at + step];
  if (at >= 0 && !next && event.key === "ArrowUp" && $("#q")) $("#q").focus();
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.scrollIntoView({ block: "nearest" });
});

// What a page begins with.
function begin() {
  for (const spot of $$("[data-load]")) {
    const address = spot.dataset.load;
    spot.removeAttribute("data-load");
    spot.classList.add("waits");
    load(address).then((answer) => (answer.ok ? answer.text() : "")).then((text) => {
      const page = new DOMParser().parseFromString(text, "text/html");
      spot.replaceChildren(...page.body.childNodes);
    }).catch(() => {}).finally(() => spot.classList.remove("waits"));
  }
  const button = $("#more");
  if (button) watchMore(button);
  const current = $(".strip [aria-current]")?.parentElement;  // The view of this page.
  if (current) current.parentElement.scrollLeft = current.offsetLeft - current.parentElement.offsetLeft - current.offsetWidth;
  const own = Intl.DateTimeFormat().resolvedOptions().timeZone;  // The browser's zone comes first.
  const zone = [...($("#zone")?.options || [])].find((one) => one.text === own);
  if (zone) $("#zone").options[0].after(zone);
  live();
}

addEventListener("error", (event) => {
  const image = event.target;
  if (!(image instanceof HTMLImageElement) || !image.closest(".shot, .large")) return;
  const text = document.createElement("span");
  text.className = "no-picture";
  text.textContent = _("picture cannot be shown");
  image.replaceWith(text);
}, true);

// The live page.
let events = null;
function live() {
  const spot = $("[data-events]");
  if (!spot) {
    events?.close();
    events = null;
    return;
  }
  if (events) return;
  events = new EventSource(spot.dataset.events);
  events.onopen = () => { const note = $("#stale"); if (note) note.textContent = _("renewed every two seconds"); };
  events.onmessage = (event) => {
    const page = new DOMParser().parseFromString(event.data, "text/html");
    const now = $("[data-events]");
    if (!now) { events?.close(); events = null; return; }
    const focused = document.activeElement?.getAttribute?.("href");
    now.replaceChildren(...page.body.childNodes);
    if (focused) now.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  };
  events.onerror = () => { load("/api/v1/info").catch(() => {}); const note = $("#stale"); if (note) note.textContent = _("The server does not answer; trying again."); };
}
begin();
