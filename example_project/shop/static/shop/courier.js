// The courier desk: parcels of a durable topic, as server-sent events.
import { connectStream } from "../django_pgnotify/pgnotify.js";

const list = document.getElementById("parcels");
const connection = document.getElementById("connection");
let arrived = null; // what came while the list was being loaded

connectStream(list.dataset.events, {
  // From here on nothing is missed, so what has come between the page and now is loaded once.
  onOpen: (first) => first && load(),
  onGap: load,
  onMessage({ data }) {
    arrived?.push(data);
    show(data);
  },
  onState(state) {
    const word = state === "waiting" ? "reconnecting" : state;
    connection.dataset.state = word;
    connection.querySelector("span").textContent = word;
  },
});

async function load() {
  arrived = [];
  try {
    const page = await (await fetch(location.href, { cache: "no-store" })).text();
    const fresh = new DOMParser().parseFromString(page, "text/html").getElementById("parcels");
    list.replaceChildren(...fresh.children);
    arrived.forEach(show);
  } finally {
    arrived = null;
  }
  showTimes();
}

function show(parcel) {
  document.getElementById(`parcel-${parcel.order}`)?.remove();
  const entry = document.createElement("li");
  entry.id = `parcel-${parcel.order}`;
  entry.className = "shipped arrive";
  const text = document.createElement("p");
  const number = document.createElement("b");
  number.textContent = parcel.number;
  text.append(number, ` ${parcel.customer}, ${parcel.city}`);
  const time = document.createElement("time");
  time.dateTime = parcel.at;
  entry.append(document.createElement("i"), text, time);
  list.prepend(entry);
  while (list.children.length > Number(list.dataset.limit)) list.lastElementChild.remove();
  showTimes();
}

function showTimes() {
  for (const element of list.querySelectorAll("time")) {
    element.textContent = new Date(element.dateTime).toLocaleTimeString([], { timeStyle: "short" });
  }
}

showTimes();
