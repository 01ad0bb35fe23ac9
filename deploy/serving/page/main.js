import { Chat } from "./chat.js";
import { EngineView } from "./engine.js";
import { setKey } from "./server.js";

const byId = (id) => document.getElementById(id);
const status = byId("status"), dialog = byId("key-dialog");

function tell(state, text) {
  if (status.textContent === text) return; // a live region is read aloud when it is set
  status.dataset.state = state;
  status.textContent = text;
}

function onError(error) {
  if (error.status === 401) askForKey();
  else tell("bad", error.status ? error.message : "the server does not answer");
}

function askForKey() {
  tell("bad", "no API key");
  if (!dialog.open) dialog.showModal();
}

const chat = new Chat((error) => error.status === 401 && askForKey());
const view = new EngineView((state) => {
  byId("model").textContent = state.model;
  document.title = `${state.model} – moray`;
  chat.setModel(state.model, state.has_chat_template ? "chat" : "text");
  tell("ok", "connected");
  if (dialog.open) dialog.close();
}, onError);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key-error").textContent = "";
  dialog.close();
  view.poll();
});

for (const name of ["chat", "engine"]) {
  byId(`show-${name}`).addEventListener("click", () => {
    document.body.dataset.view = name;
    for (const other of ["chat", "engine"]) byId(`show-${other}`).setAttribute("aria-pressed", String(other === name));
  });
}

view.poll();
byId("input").focus();
