// The live view: asks for the engine's state once a second while the page is visible.

import { ExpertMap, paletteOf } from "./experts.js";
import { getState } from "./server.js";

const INTERVAL_MS = 1000;
const KEPT = 4; // answers that rates are taken over
const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

const byId = (id) => document.getElementById(id);
const decode = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

function element(tag, text, name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Calls `onState` with every answer and `onError` with every failure, after which it goes on.
export class EngineView {
  constructor(onState, onError) {
    this.onState = onState;
    this.onError = onError;
    this.map = new ExpertMap(byId("map"), byId("cell"));
    this.past = [];
    this.timer = 0;
    this.isAsking = false;
    document.addEventListener("visibilitychange", () => this.poll());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.state && this.showLegend());
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    try {
      this.take(await getState());
      this.onState(this.state);
    } catch (error) {
      this.onError(error);
    } finally {
      this.isAsking = false;
    }
    this.timer = setTimeout(() => this.poll(), INTERVAL_MS);
  }

  take(state) {
    if (this.past.length && this.past[0].num_restarts !== state.num_restarts) this.past = [];
    this.past = [...this.past, state].slice(-KEPT);
    this.state = state;
    this.layers = state.layers.map((layer) => ({ place: decode(layer.place), recent: decode(layer.recent) }));
    this.showNumbers();
    this.showLanes();
    this.showLegend();
    this.map.show(state.places, this.layers);
  }

  // How fast a count has grown of late.
  rate(of) {
    const first = this.past[0];
    const seconds = this.state.time_s - first.time_s;
    return seconds > 0 ? (of(this.state) - of(first)) / seconds : 0;
  }

  showNumbers() {
    const { state } = this;
    const hits = (uses, misses) => (uses > 0 ? percent.format((uses - misses) / uses) : "–");
    const [uses, misses] = ["uses", "misses"].map((name) => this.rate((s) => s[name]));
    const limit = state.kv_limit_bytes === null ? "no limit" : `of ${bytes(state.kv_limit_bytes)}`;
    const shown = [
      ["Tokens/s", this.rate((s) => s.tokens_decoded).toFixed(1), `${counts.format(state.tokens_decoded)} generated`],
      ["Prompt/s", this.rate((s) => s.prompt_tokens_computed).toFixed(1),
        `${counts.format(state.prompt_tokens_reused)} reused`],
      ["Hit rate", hits(uses, misses), `overall ${hits(state.uses, state.misses)}`],
      ["Running", counts.format(state.running), `batching ${state.batching}`],
      ["Queue", counts.format(state.waiting), `${state.requests} of ${state.max_requests} open`],
      ["KV cache", bytes(state.kv_reserved_bytes), limit],
    ];
    byId("numbers").replaceChildren(
      ...shown.map(([name, value, more]) => {
        const box = document.createElement("div");
        box.append(element("dt", name), element("dd", value), element("dd", more, "more"));
        return box;
      }),
    );
  }

  showLanes() {
    const lanes = Object.keys(this.state.bytes_by_lane);
    const rates = lanes.map((lane) => this.rate((s) => s.bytes_by_lane[lane] ?? 0));
    const all = rates.reduce((sum, rate) => sum + rate, 0);
    const body = byId("lanes").tBodies[0];
    while (body.rows.length > lanes.length) body.deleteRow(-1);
    lanes.forEach((lane, i) => {
      const row = body.rows[i] ?? newLane(body);
      row.cells[0].textContent = lane;
      row.cells[1].textContent = `${bytes(rates[i])}/s`;
      row.cells[2].firstChild.style.width = `${all > 0 ? (100 * rates[i]) / all : 0}%`;
      row.cells[3].textContent = bytes(this.state.bytes_by_lane[lane]);
    });
  }

  showLegend() {
    const { places } = this.state;
    const totals = new Array(places.length).fill(0);
    for (const { place } of this.layers) for (const index of place) totals[index]++;
    const palette = paletteOf(places);
    byId("legend").replaceChildren(
      ...places.map(({ tier, name, node }, index) => {
        const entry = element("li", "");
        const swatch = document.createElement("i");
        swatch.style.background = palette[index][9];
        const where = [name.startsWith(tier) ? "" : tier, name, node && node !== name && `(${node})`];
        entry.append(swatch, `${where.filter(Boolean).join(" ")}: ${counts.format(totals[index])}`);
        return entry;
      }),
    );
  }
}

function newLane(body) {
  const row = body.insertRow();
  const name = document.createElement("th");
  name.scope = "row";
  row.append(name, element("td", ""), element("td", ""), element("td", ""));
  row.cells[2].append(element("div", "", "bar"));
  return row;
}
