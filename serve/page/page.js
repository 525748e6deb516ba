// The endpoint's page: a chat with a served model, and a race between the AR model and k tokens a step.
// Everything goes through the endpoint's own API. One event of a stream holds what one step added.

const $ = (id) => document.getElementById(id);

// --- the endpoint ---

let key = ""; // in memory alone
let asking = null;

/** Ask for the API key. Throws an error when the dialog is closed without one. */
function askForKey() {
  const dialog = $("key-dialog");
  $("key-problem").textContent = key && "The endpoint refused this key.";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => {
      asking = null;
      key = $("key").value.trim();
      $("key").value = "";
      if (dialog.returnValue) resolve();
      else reject(new Error("This endpoint needs an API key."));
    };
  });
}

/** The response to a request, which is repeated with a key if the endpoint wants one. Throws an error with its message. */
async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const options = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const response = await fetch(new URL(path, document.baseURI), options);
  if (response.status === 401) {
    await (asking ??= askForKey());
    return call(path, body, signal);
  }
  if (response.ok) return response;
  const text = await response.text();
  throw new Error(messageIn(text) ?? `The endpoint answered with status ${response.status}. ${text}`);
}

function messageIn(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

/** The events of a streamed answer. Throws an error when the stream reports one or ends early. */
async function* stream(path, body, signal) {
  const options = { stream: true, stream_options: { continuous_usage_stats: true } };
  const response = await call(path, { ...body, ...options }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}

// --- an answer and its figures ---

const clear = (place) => place.replaceChildren($("answer").content.cloneNode(true));

/** Stream an answer into an element. Returns its text, tokens and seconds; `ended` is false if it failed or was stopped. */
async function answer(place, path, body, signal) {
  clear(place);
  const result = { text: "", tokens: 0, seconds: 0, ended: false };
  const start = performance.now();
  let first = 0;
  let shown = 0;
  try {
    for await (const { choices, usage } of stream(path, body, signal)) {
      if (!usage) continue; // the event that opens a message
      const text = choices[0].delta?.content ?? choices[0].text ?? "";
      result.tokens = usage.completion_tokens;
      result.seconds = (performance.now() - start) / 1000;
      if (result.tokens) first ||= result.seconds;
      if (text) {
        showStep(place, text, `${result.tokens - shown} tokens, until step ${usage.decoding.steps}`);
        shown = result.tokens;
      }
      result.text += text;
      showFigures(place, result, first, usage.decoding);
    }
    result.ended = true;
  } catch (error) {
    if (error.name !== "AbortError") place.querySelector(".problem").textContent = error.message;
  }
  return result;
}

function showStep(place, text, title) {
  const step = document.createElement("span");
  step.className = "step";
  step.textContent = text;
  step.title = title;
  place.querySelector(".text").append(step);
}

function showFigures(place, { tokens, seconds }, first, decoding) {
  const figures = {
    tokens,
    steps: decoding.steps,
    perStep: decoding.tokens_a_step.toFixed(2),
    accepted: decoding.draft_tokens ? `${decoding.accepted_draft_tokens} of ${decoding.draft_tokens}` : "–",
    first: first ? `${Math.round(first * 1000)} ms` : "–",
    speed: (tokens / seconds).toFixed(1),
  };
  for (const [name, value] of Object.entries(figures)) {
    place.querySelector(`[data-figure=${name}]`).textContent = value;
  }
}

// --- settings and models ---

let models = [];

/** Path and body of a request for the next message of a conversation, or for the continuation of its last text. */
function request(model, messages) {
  const body = {
    model: model.id,
    temperature: $("temperature").valueAsNumber,
    seed: $("seed").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
  };
  if (model.k > 1) Object.assign(body, { k: Math.min($("k").valueAsNumber, model.k), acceptance: $("acceptance").value });
  if (model.chat_template) return ["v1/chat/completions", { ...body, messages }];
  return ["v1/completions", { ...body, prompt: messages.at(-1).content }];
}

/** Learn which models are served, and adapt the page to them. */
async function connect() {
  models = (await (await call("v1/models")).json()).data;
  const [student] = models;
  $("served").textContent = `serves ${models.map(({ id, k }) => `${id} (${k > 1 ? `k = ${k}` : "AR"})`).join(" and ")}`;
  $("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  $("k").max = student.k;
  $("k").value = student.k;
  $("acceptance").value = student.acceptance;
  $("max-tokens").max = student.max_model_len;
  $("max-tokens").value = Math.min(128, student.max_model_len >> 1);
  if (!student.chat_template) {
    $("chat-link").textContent = $("chat-title").textContent = "Text";
    $("chat-hint").textContent = "This model has no chat template. It continues each text, without the ones before.";
    $("message-label").textContent = "Your text";
  }
  $("student-title").textContent = `${student.id}: up to k tokens a step`;
  $("ar-title").textContent = `${opponent().id}: one token a step`;
  if (student.k === 1) $("race-hint").textContent = "A race needs a student with k > 1. This endpoint serves an AR model alone.";
  $("race-form").hidden = document.querySelector(".lanes").hidden = student.k === 1;
  showDials();
}

/** The AR model of the race; without one, the student itself with one token a step. */
const opponent = () => models.find(({ id }) => id === "teacher") ?? models[0];

function showDials() {
  $("k-value").textContent = $("k").value;
  $("temperature-value").textContent = $("temperature").value;
  document.body.classList.toggle("marked", $("marked").checked);
}

function showView() {
  const name = location.hash === "#race" ? "race" : "chat";
  for (const view of ["chat", "race"]) {
    $(view).hidden = view !== name;
    document.querySelector(`nav a[href="#${view}"]`).ariaCurrent = view === name ? "page" : null;
  }
}

/** Run some work when a form is sent. While it runs, the form's button stops it. */
function onSubmit(form, work) {
  const button = form.querySelector("button[type=submit]");
  const label = button.textContent;
  let running = null;
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    if (!models.length) return start();
    for (const id of ["seed", "max-tokens"]) {
      if ($(id).checkValidity()) continue;
      $("settings").open = true; // a field that is not shown cannot say what is wrong with it
      $(id).reportValidity();
      return;
    }
    running = new AbortController();
    button.textContent = "Stop";
    button.formNoValidate = true; // an empty field must not prevent it
    try {
      await work(running.signal);
    } finally {
      running = null;
      button.textContent = label;
      button.formNoValidate = false;
    }
  };
  form.querySelector("textarea").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit(button);
  };
  return () => running?.abort();
}

// --- the chat ---

let conversation = [];

function addMessage(who, kind) {
  const item = document.createElement("li");
  const title = document.createElement("h3");
  const place = document.createElement("div");
  item.className = kind;
  title.textContent = who;
  item.append(title, place);
  $("messages").append(item);
  return place;
}

async function send(signal) {
  const model = models[$("model").selectedIndex];
  const messages = [...conversation, { role: "user", content: $("message").value }];
  const text = document.createElement("p");
  text.className = "text";
  text.textContent = $("message").value;
  addMessage("You", "user").append(text);
  $("message").value = "";
  $("chat-status").textContent = "";
  const place = addMessage(model.id, "model");
  const result = await answer(place, ...request(model, messages), signal);
  if (!place.isConnected) return; // the chat was started again
  if (result.text) conversation = [...messages, { role: "assistant", content: result.text }];
  $("chat-status").textContent = result.ended ? `The answer is complete: ${result.tokens} tokens.` : "The answer is not complete.";
}

// --- the race ---

async function race(signal) {
  const [student, ar] = [models[0], opponent()];
  const messages = [{ role: "user", content: $("prompt").value }];
  const [path, body] = request(ar, messages);
  const runs = [
    () => answer($("ar"), path, ar === student ? { ...body, k: 1 } : body, signal),
    () => answer($("student"), ...request(student, messages), signal),
  ];
  clear($("student"));
  $("race-status").textContent = "The race has begun.";
  const inTurn = $("race-form").elements.order.value === "in turn";
  const results = inTurn ? [await runs[0](), await runs[1]()] : await Promise.all(runs.map((run) => run()));
  $("race-status").textContent = verdict(...results);
}

function verdict(ar, student) {
  if (!ar.ended || !student.ended) return "The race did not finish.";
  const times = `${models[0].id} took ${student.seconds.toFixed(2)} s, ${opponent().id} ${ar.seconds.toFixed(2)} s`;
  const ratio = `${(ar.seconds / student.seconds).toFixed(2)}× as fast`;
  let same = 0;
  while (same < ar.text.length && ar.text[same] === student.text[same]) same += 1;
  const equal = ar.text === student.text ? "Both texts are equal." : `The texts differ after ${same} characters.`;
  return `${times}: ${ratio}. ${equal}`;
}

// --- start ---

/** Keep the end of the page in view while it grows, unless the reader has scrolled up. */
function followTheEnd() {
  let atEnd = true;
  const end = () => document.documentElement.scrollHeight;
  let before = 0;
  window.onscroll = () => {
    // The page may have grown between our own scrolling and this event; only a reader scrolls up.
    atEnd = (atEnd && window.scrollY >= before) || window.scrollY + window.innerHeight > end() - 50;
    before = window.scrollY;
  };
  new ResizeObserver(() => atEnd && window.scrollTo(0, end())).observe($("messages"));
}

async function start() {
  $("problem").replaceChildren();
  try {
    await connect();
  } catch (error) {
    const again = document.createElement("button");
    again.textContent = "Try again";
    again.onclick = start;
    $("problem").replaceChildren(`${error.message} `, again);
  }
}

$("settings").open = matchMedia("(min-width: 48rem)").matches;
$("settings").oninput = showDials;
window.onhashchange = showView;
const stopChat = onSubmit($("chat-form"), send);
onSubmit($("race-form"), race);
$("clear").onclick = () => {
  stopChat();
  conversation = [];
  $("messages").replaceChildren();
  $("message").focus();
};
followTheEnd();
clear($("ar"));
clear($("student"));
showDials();
showView();
start();
