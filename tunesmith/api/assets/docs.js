"use strict";
const make = (tag, text, ...inside) => {
  const found = document.createElement(tag);
  if (text) found.textContent = text;
  found.append(...inside);
  return found;
};
const example = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="...")
client.chat.completions.create(model="...", messages=[{"role": "user", "content": "Hello"}])`;
document.getElementById("example").textContent = example;

function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).filter((k) => k !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((v) => JSON.stringify(v)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items) || "anything"}`;
  return schema.type || "anything";
}

function fields(schema, all) {
  if (schema && schema.$ref) schema = all[schema.$ref.split("/").pop()];
  const rows = Object.entries((schema && schema.properties) || {}).map(([name, of]) =>
    make("tr", "", make("td", "", make("code", name)), make("td", kind(of)),
      make("td", (schema.required || []).includes(name) ? "required" : ""), make("td", of.description || "")));
  return rows.length ? make("table", "", ...rows) : "";
}

fetch("/openapi.json").then((a) => a.json()).then((api) => {
  const all = api.components.schemas, routes = document.getElementById("routes");
  for (const [path, verbs] of Object.entries(api.paths))
    for (const [verb, route] of Object.entries(verbs)) {
      const told = make("details", "", make("summary", "", Object.assign(make("span", verb.toUpperCase()), { className: "verb" }), make("code", path)));
      told.append(make("p", route.description || route.summary || ""));
      const body = Object.values((route.requestBody || { content: {} }).content)[0];
      if (body) told.append(make("h4", "Asked"), fields(body.schema, all));
      const good = Object.values(((route.responses || {})["200"] || {}).content || {})[0];
      if (good) told.append(make("h4", "Answered"), fields(good.schema, all));
      routes.append(told);
    }
});
