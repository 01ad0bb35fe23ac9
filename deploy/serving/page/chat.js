// The chat: /v1/chat/completions, or /v1/completions where the model has no chat template.

import { renderMarkdown } from "./markdown.js";
import { streamChunks } from "./server.js";

const byId = (id) => document.getElementById(id);
const HINTS = {
  chat: "Say something. The conversation stays in this page; nothing of it is stored.",
  text: "This model has no chat template: it continues the text that you send.",
};
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty"];

export class Chat {
  constructor(onError) {
    this.onError = onError;
    this.turns = [];
    this.running = null; // AbortController of the answer that is coming
    this.input = byId("input");
    this.log = byId("messages");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.running ? this.running.abort() : this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) byId("composer").requestSubmit();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
  }

  setModel(model, mode) {
    if (this.model === model && this.mode === mode) return;
    [this.model, this.mode] = [model, mode];
    document.body.dataset.mode = mode;
    byId("hint").textContent = HINTS[mode];
    this.input.placeholder = mode === "chat" ? "Message" : "Text to continue";
  }

  clear() {
    this.running?.abort();
    this.setRunning(null);
    this.turns = [];
    this.log.replaceChildren(byId("hint") ?? this.hint);
    this.input.focus();
  }

  async send() {
    const text = this.input.value;
    if (!text.trim() || !this.model) return;
    const body = this.body(text);
    if (!body) return;
    this.hint = byId("hint") ?? this.hint;
    this.hint.remove();
    this.input.value = "";
    if (this.mode === "chat") this.log.append(made("div", "message user", text));
    const answer = new Answer(this.log, this.mode === "chat" ? null : text);
    const turn = { role: "user", content: text };
    this.turns.push(turn);
    const running = new AbortController();
    this.setRunning(running);
    try {
      await this.read(body, answer, running.signal);
    } catch (error) {
      if (running.signal.aborted) answer.end("stopped");
      else {
        answer.fail(error.message);
        this.onError(error);
      }
    }
    if (this.running !== running) return; // a new chat has begun
    if (answer.text) this.turns.push({ role: "assistant", content: answer.text });
    else if (this.turns.at(-1) === turn) this.turns.pop(); // nothing came of it
    this.setRunning(null);
  }

  setRunning(running) {
    this.running = running;
    byId("send").textContent = running ? "Stop" : "Send";
  }

  async read(body, answer, signal) {
    const path = this.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    const started = performance.now();
    let first = 0, reason = "", usage = null;
    for await (const chunk of streamChunks(path, body, signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      first ||= performance.now();
      reason = choice.finish_reason ?? reason;
      answer.add(choice.delta ? choice.delta.content ?? "" : choice.text);
    }
    const tokens = usage?.completion_tokens ?? 0;
    const perSecond = tokens > 1 ? ((tokens - 1) * 1000) / (performance.now() - first) : 0;
    const parts = [
      `${tokens} tokens`,
      perSecond && `${perSecond.toFixed(1)} tokens/s`,
      `first after ${((first - started) / 1000).toFixed(2)} s`,
      `prompt ${usage?.prompt_tokens ?? 0} tokens, ${usage?.prompt_tokens_details?.cached_tokens ?? 0} cached`,
      reason === "length" && "ended at max tokens",
    ];
    answer.end(parts.filter(Boolean).join(" · "));
  }

  // The request; null if a setting is not valid, which the browser tells.
  body(text) {
    if (!byId("composer").checkValidity()) {
      byId("settings").open = true;
      byId("composer").reportValidity();
      return null;
    }
    const made = { model: this.model, stream: true, stream_options: { include_usage: true } };
    for (const name of NUMBERS) if (byId(name).value !== "") made[name] = Number(byId(name).value);
    const stop = byId("stop").value.split("\n").filter(Boolean).slice(0, 4);
    if (stop.length) made.stop = stop;
    if (this.mode !== "chat") return { ...made, prompt: text };
    const system = byId("system").value.trim();
    const before = system ? [{ role: "system", content: system }] : [];
    return { ...made, messages: [...before, ...this.turns, { role: "user", content: text }] };
  }
}

// One answer, drawn at most once a frame. `prompt`: the text it continues, null in a chat.
class Answer {
  constructor(log, prompt) {
    this.log = log;
    this.text = "";
    this.body = made("div", prompt === null ? "body" : "body plain");
    if (prompt !== null) {
      this.rest = document.createTextNode("");
      this.body.append(made("b", "", prompt), this.rest);
    }
    this.note = made("div", "note", "…");
    this.box = made("div", "message assistant");
    this.box.append(this.body, this.note);
    log.append(this.box);
    log.scrollTop = log.scrollHeight;
  }

  add(text) {
    this.text += text;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    if (this.rest) this.rest.data = this.text;
    else this.body.replaceChildren(renderMarkdown(this.text));
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  end(note) {
    this.note.textContent = note;
    this.draw();
  }

  fail(message) {
    this.note.classList.add("bad");
    this.end(message);
  }
}

function made(tag, name, text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
}
