// The board's live half. The server sends HTML of rows as they are now; this puts it in its place.
import { connectSocket } from "../django_pgnotify/pgnotify.js";

const CHECK_EVERY = 60000; // ms between whole boards, should the server itself have missed something

const $ = (selector, root = document) => root.querySelector(selector);
const connection = $("#connection");

const handlers = {
  snapshot(message) {
    $("#columns").innerHTML = message.columns;
    $("#ticker").innerHTML = message.ticker;
    showSummary(message.summary, false);
    showTimes();
    say("live");
  },

  order({ pk, status, html, published_at }) {
    const before = document.getElementById(`order-${pk}`);
    const column = html && $(`.column[data-status="${status}"] .cards`);
    if (column) {
      const card = fromHTML(html);
      const stays = before && before.parentElement === column;
      stays ? before.replaceWith(card) : column.prepend(card);
      if (before && !stays) before.remove();
      card.classList.add(stays ? "flash" : "arrive");
      trim(column, $("#columns"));
    } else {
      before?.remove();
    }
    // After the next frame: what is measured has been painted.
    requestAnimationFrame(() => setTimeout(() => {
      $("#latency").textContent = Math.max(0, Date.now() - Date.parse(published_at));
      mark($(".tile.live"));
    }));
    showTimes();
  },

  activity({ pk, html }) {
    if (document.getElementById(`activity-${pk}`)) return;
    const list = $("#ticker");
    const entry = fromHTML(html);
    entry.classList.add("arrive");
    // By time: two receivers that hear of one event write their lines in any order.
    const at = Date.parse($("time", entry).dateTime);
    const older = [...list.children].find((other) => Date.parse($("time", other).dateTime) <= at);
    list.insertBefore(entry, older ?? null);
    trim(list, list);
    showTimes();
  },

  summary: ({ summary }) => showSummary(summary, true),
};

function showSummary(summary, flash) {
  for (const element of document.querySelectorAll("[data-figure]")) {
    const value = String(summary[element.dataset.figure]);
    if (element.textContent !== value) {
      element.textContent = value;
      const tile = element.closest(".tile");
      if (flash && tile) mark(tile);
    }
  }
  for (const element of document.querySelectorAll("[data-count]")) {
    element.textContent = summary.by_status[element.dataset.count];
  }
  $("#computed").setAttribute("datetime", summary.computed_at);
  showTimes();
}

function mark(element) {
  element.classList.remove("changed");
  void element.offsetWidth; // restart the animation
  element.classList.add("changed");
}

function say(state) {
  connection.dataset.state = state;
  $("span", connection).textContent = state;
}

function fromHTML(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content.firstElementChild;
}

function trim(list, { dataset }) {
  while (list.children.length > Number(dataset.limit)) list.lastElementChild.remove();
}

function showTimes() {
  for (const element of document.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    const seconds = (Date.now() - moment) / 1000;
    element.title = moment.toLocaleString();
    element.textContent =
      seconds < 45 ? "now"
      : seconds < 3600 ? `${Math.max(1, Math.round(seconds / 60))} min`
      : seconds < 86400 ? `${Math.round(seconds / 3600)} h`
      : moment.toLocaleDateString(undefined, { day: "numeric", month: "short" });
  }
}

// The buttons are those of a plain form, which works without this too. The board itself is not
// touched: it changes when the event comes back.
document.addEventListener("click", async (click) => {
  const button = click.target.closest("button[formaction]");
  if (!button) return;
  click.preventDefault();
  button.disabled = true;
  try {
    const answer = await fetch(button.getAttribute("formaction"), {
      method: "POST",
      headers: { Accept: "application/json", "X-CSRFToken": $("#act [name=csrfmiddlewaretoken]").value },
    });
    if (answer.status === 401) {
      location.href = (await answer.json()).login;
    } else if (!answer.ok) {
      toast((await answer.json().catch(() => ({}))).error ?? `The server answered ${answer.status}`);
    }
  } catch {
    toast("The server does not answer");
  } finally {
    button.disabled = false;
  }
});

function toast(text) {
  const element = $("#toast");
  element.textContent = text;
  element.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (element.hidden = true), 4000);
}

// Each connection begins with a whole board, so a gap that a reconnect leaves is none here. Live is
// what that has arrived on, not what has merely been accepted.
const link = connectSocket("/ws/board/", {
  longestPause: 5000,
  onMessage: (message) => handlers[message.type]?.(message),
  onState: (state) => state === "waiting" && say("reconnecting"),
});
const refresh = () => link.send({ type: "snapshot" });

document.addEventListener("visibilitychange", () => document.hidden || refresh());
setInterval(refresh, CHECK_EVERY);
setInterval(showTimes, 15000);
showTimes();
