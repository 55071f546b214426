// Events of django-pgnotify in a page: over a websocket (SubscriptionConsumer) or as server-sent
// events (event_stream). An ES module without dependencies:
//
//   import { connectSocket, connectStream } from "/static/django_pgnotify/pgnotify.js";
//
//   const link = connectStream("/events/", {
//     onOpen(first) {},     // every later event will come: load what the page shows now, if first
//     onMessage(data) {},   // an event
//     onGap(gap) {},        // {since, until, cause}: anything may have changed, so load it again
//     onState(state) {},    // "connecting", "live", "waiting", "refused" or "closed"
//     onRefused(reason) {}, // it will not be tried again
//   });
//   link.close();
//
// A link that breaks comes back by itself, for ever: after a random part of a pause that doubles
// (full jitter), at once when the page is looked at again or the network is back. One that is
// silent for longer than the server ever is counts as broken.

const FIRST_PAUSE = 500; // ms: the bound of the first pause
const LONGEST_PAUSE = 15000;
const HEALTHY_AFTER = 5000; // ms that a link has to live for its pauses to begin anew

/** A random part of the pause that belongs to this attempt (0 for the first), in ms. */
export function pauseBefore(attempt, first = FIRST_PAUSE, longest = LONGEST_PAUSE) {
  return Math.random() * Math.min(longest, first * 2 ** Math.min(attempt, 30));
}

class Link {
  constructor(url, options) {
    this.url = url;
    this.options = { firstPause: FIRST_PAUSE, longestPause: LONGEST_PAUSE, ...options };
    this.state = "closed";
    this.heardAt = 0; // when anything last came, by the page's own clock
    this.opened = false;
    this.attempts = 0;
    this.ends = new AbortController();
    const signal = this.ends.signal;
    const wake = () => document.hidden || this.wake();
    document.addEventListener("visibilitychange", wake, { signal });
    addEventListener("online", wake, { signal });
    addEventListener("pageshow", wake, { signal });
    this.begin();
  }

  close() {
    this.end("closed");
  }

  // -- for those below ---------------------------------------------------------------------------

  begin() {
    clearTimeout(this.timer);
    this.say("connecting");
    this.heard();
    this.watch();
    this.connect();
  }

  live() {
    this.liveSince = Date.now();
    this.say("live");
    const first = !this.opened;
    this.opened = true;
    this.tell("onOpen", first);
  }

  /** The link has broken: once more, later. */
  broken(atLeast = 0) {
    if (this.over || this.state === "waiting") return;
    clearTimeout(this.timer);
    const healthy = this.state === "live" && Date.now() - this.liveSince > HEALTHY_AFTER;
    if (healthy) this.attempts = 0;
    this.say("waiting");
    const pause = pauseBefore(this.attempts++, this.options.firstPause, this.options.longestPause);
    this.timer = setTimeout(() => this.begin(), Math.max(atLeast, pause));
  }

  end(state) {
    if (this.over) return;
    clearTimeout(this.timer);
    this.ends.abort();
    this.drop();
    this.say(state);
  }

  get over() {
    return this.ends.signal.aborted;
  }

  /** Somebody looks at the page again, or the network is back. */
  wake() {
    if (this.over) return;
    if (this.state === "waiting") this.begin();
    else this.watch();
  }

  heard() {
    this.heardAt = Date.now();
    this.unanswered = false;
    clearTimeout(this.patience);
  }

  /** Call a function of the page; its mistakes are not ours. */
  tell(name, ...args) {
    try {
      this.options[name]?.(...args);
    } catch (error) {
      reportError(error);
    }
  }

  say(state) {
    if (state !== this.state) {
      this.state = state;
      this.tell("onState", state);
    }
  }
}

// -- server-sent events ----------------------------------------------------------------------------

/** Calls `dispatch({event, data, id})` for each block in the text that `push()` is given. */
export class StreamParser {
  constructor(dispatch, onRetry = () => {}) {
    this.dispatch = dispatch;
    this.onRetry = onRetry;
    this.id = "";
    this.rest = "";
    this.reset();
  }

  reset() {
    this.event = "message";
    this.data = [];
    this.nextId = this.id;
  }

  push(text) {
    // A carriage return at the end may be half of a line's end.
    const lines = (this.rest + text).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop();
    for (const line of lines) this.line(line);
  }

  line(line) {
    if (line === "") {
      this.id = this.nextId; // and not before: a block that was cut off has not been seen
      if (this.data.length) {
        this.dispatch({ event: this.event, data: this.data.join("\n"), id: this.id });
      }
      return this.reset();
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") this.event = value;
    else if (name === "data") this.data.push(value);
    else if (name === "id" && !value.includes("\0")) this.nextId = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.onRetry(Number(value));
  }
}

class StreamLink extends Link {
  // Not an EventSource: that says nothing of comments, so a link that is dead and was not closed
  // would never be found, and all pages of a server that restarts would come back at one moment.
  connect() {
    this.controller = new AbortController();
    const { signal } = this.controller;
    this.read(signal).catch(() => signal.aborted || this.broken());
  }

  async read(signal) {
    const headers = { Accept: "text/event-stream" };
    if (this.lastId) headers["Last-Event-ID"] = this.lastId;
    const url = new URL(this.url, location.href);
    for (const name of this.options.groups ?? []) url.searchParams.append("group", name);
    const response = await fetch(url, {
      headers, signal, cache: "no-store", credentials: this.options.credentials ?? "same-origin",
    });
    const streams = (response.headers.get("Content-Type") ?? "").startsWith("text/event-stream");
    if (response.status >= 500 || [408, 425, 429].includes(response.status)) {
      const seconds = Number(response.headers.get("Retry-After")) || 0;
      await response.body?.cancel();
      return this.broken(seconds * 1000);
    }
    if (!response.ok || response.status === 204 || !streams) {
      const reason = streams ? "" : (await response.text()).slice(0, 200).trim();
      this.tell("onRefused", { status: response.status, reason });
      return this.end("refused");
    }
    const parser = new StreamParser(
      (block) => this.block(block),
      (milliseconds) => (this.options.firstPause = milliseconds),
    );
    parser.id = parser.nextId = this.lastId ?? "";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done || signal.aborted) break;
      this.heard();
      if (this.state !== "live") this.live();
      parser.push(value);
      this.lastId = parser.id;
    }
    if (!signal.aborted) this.broken();
  }

  block({ event, data, id }) {
    let value = data;
    try {
      value = JSON.parse(data);
    } catch {
      // of another server, then
    }
    if (event === "gap") this.tell("onGap", value);
    else this.tell("onMessage", value, { event, id });
  }

  /** Give up on a connection that has been silent for too long. */
  watch() {
    clearTimeout(this.watcher);
    const left = this.heardAt + (this.options.silence ?? 45000) - Date.now();
    if (left <= 0) {
      this.drop();
      this.broken();
    } else if (!this.over) {
      this.watcher = setTimeout(() => this.watch(), left);
    }
  }

  drop() {
    clearTimeout(this.watcher);
    this.controller?.abort();
  }
}

/**
 * Hear an `event_stream()`. Options beside the callbacks: `groups` (names to ask for), `silence`
 * (ms, 45000: three of the server's heartbeats), `firstPause`, `longestPause` (ms), `credentials`.
 */
export function connectStream(url, options = {}) {
  return new StreamLink(url, options);
}

// -- websockets ------------------------------------------------------------------------------------

class SocketLink extends Link {
  connect() {
    this.groups ??= new Set(this.options.groups);
    const url = new URL(this.url, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = (this.socket = new WebSocket(url));
    socket.onopen = () => socket === this.socket && this.joined();
    socket.onmessage = ({ data }) => socket === this.socket && this.message(data);
    socket.onclose = (close) => {
      if (socket !== this.socket || this.over) return;
      // 4403 and its kind are the server's own word that it does not want to.
      if (close.code >= 4400 && close.code < 4500) {
        this.tell("onRefused", { status: close.code - 4000, reason: close.reason });
        this.end("refused");
      } else {
        this.lost();
      }
    };
  }

  /** Open; live once the server has said that the groups are joined. */
  joined() {
    this.heard();
    if (this.groups.size) this.send({ subscribe: [...this.groups] });
    else this.confirmed();
  }

  confirmed() {
    if (this.state === "live") return;
    const again = this.opened;
    const since = this.lostAt;
    this.live();
    // What was sent meanwhile is gone, and nobody knows what it was.
    if (again) {
      const until = new Date().toISOString();
      this.tell("onGap", { since, until, cause: "the connection was lost" });
    }
  }

  message(text) {
    this.heard();
    const message = JSON.parse(text);
    if (message.subscribed || message.refused) {
      for (const name of message.refused ?? []) this.groups.delete(name);
      if (message.refused) {
        this.tell("onRefused", { groups: message.refused, reason: message.reason });
      }
      if (message.subscribed || !this.groups.size) this.confirmed();
      if (message.subscribed) this.tell("onSubscribed", message.subscribed);
    } else if (this.state !== "live" && message.error && !("type" in message)) {
      // What we asked for cannot be had, nor will it be when we ask again.
      this.tell("onRefused", { groups: [...this.groups], reason: message.error });
      this.end("refused");
    } else if (message.type === "pgnotify.gap") {
      this.tell("onGap", message);
    } else if (!("pong" in message) && !message.unsubscribed) {
      this.tell("onMessage", message);
    }
  }

  /** Send an object; false if there is no connection now. */
  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** Join a group, now and after every reconnect; `onSubscribed` is told once it is joined. */
  subscribe(name) {
    this.groups.add(name);
    this.send({ subscribe: name });
  }

  unsubscribe(name) {
    this.groups.delete(name);
    this.send({ unsubscribe: name });
  }

  /** Ask whether the server is still there, and give up on a connection that does not answer. */
  watch() {
    clearTimeout(this.watcher);
    if (this.over) return;
    this.send({ ping: Date.now() });
    if (!this.unanswered) {
      // Nor may it take longer to be opened.
      this.unanswered = true;
      this.patience = setTimeout(() => this.lost(), this.options.pongWithin ?? 10000);
    }
    this.watcher = setTimeout(() => this.watch(), this.options.pingEvery ?? 30000);
  }

  lost() {
    if (this.state === "live") this.lostAt = new Date(this.heardAt).toISOString();
    this.drop();
    this.broken();
  }

  drop() {
    clearTimeout(this.watcher);
    clearTimeout(this.patience);
    const socket = this.socket;
    this.socket = null; // what it still says is of no interest
    socket?.close();
  }
}

/**
 * Hear a `SubscriptionConsumer`. `onMessage` gets what was sent to a group: `{type, event}` of
 * `forward()`. `onSubscribed(groups)` is called whenever groups have been joined, so after a
 * reconnect too: every later message of theirs will come. Options beside the callbacks: `groups`,
 * `pingEvery` (ms, 30000), `pongWithin` (ms, 10000), `firstPause`, `longestPause` (ms). The link
 * has `subscribe(group)`, `unsubscribe(group)` and `send(object)`, too.
 */
export function connectSocket(url, options = {}) {
  return new SocketLink(url, options);
}
