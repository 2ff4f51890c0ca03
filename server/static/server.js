/** The HTTP side: the minidsv server that this page came from. URLs are relative to the page. */

export class Server {
  key = ""; // a bearer key; lives in this object only

  async #fetch(path, body, signal) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    return response;
  }

  /** What this server offers of what the page can show. */
  async features() {
    const { components, paths } = await (await this.#fetch("openapi.json")).json();
    return {
      logprobs: "return_logprob" in components.schemas.GenerateRequest.properties,
      tokenize: "/tokenize" in paths,
      metrics: "/metrics" in paths,
    };
  }

  /** The events of POST /generate, as they come. */
  async *generate(body, signal) {
    const response = await this.#fetch("generate", { ...body, stream: true }, signal);
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }

  /** The texts of the prompt's tokens, as the engine will see them. */
  async tokenTexts(prompt) {
    const response = await this.#fetch("tokenize", { prompt, return_token_strs: true });
    return (await response.json()).token_strs ?? [];
  }

  /** Values of Prometheus gauges without labels, or summed over their labels, by name. */
  async metrics() {
    const values = new Map();
    for (const line of (await (await this.#fetch("metrics")).text()).split("\n")) {
      const sample = /^([\w:]+)(?:\{.*\})? ([^ ]+)/.exec(line);
      if (sample) values.set(sample[1], (values.get(sample[1]) ?? 0) + Number(sample[2]));
    }
    return values;
  }
}

/** Why a response is none, in the server's words where it gives them. */
async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** The `data:` of each server-sent event in a stream of bytes. */
async function* eventData(bytes) {
  let pending = "";
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
