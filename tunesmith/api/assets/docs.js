"use strict";
const make = (tag, text, ...inside) => {
  const found = document.createElement(tag);
  if (text) found.textContent = text;
  found.append(...inside);
  return found;
};
const at = (id) => document.getElementById(id);
at("example").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="...")
client.chat.completions.create(model="...", messages=[{"role": "user", "content": "Hello"}])`;

// What a schema takes, in words and in links to the shapes below.
function kind(schema) {
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop(), link = Object.assign(make("a", name), { href: `#${name}` });
    link.onclick = () => { at(name).open = true; };
    return [link];
  }
  const some = (schema.anyOf || schema.oneOf || []).filter((one) => one.type !== "null");
  if (some.length) return some.flatMap((one, i) => (i ? [" or ", ...kind(one)] : kind(one)));
  if (schema.enum) return [schema.enum.map((v) => JSON.stringify(v)).join(", ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...kind(schema.items || {})];
  return [schema.type || "anything"];
}

const row = (name, schema, required, told) =>
  make("tr", "", make("td", "", make("code", name)), make("td", "", ...kind(schema)),
    make("td", required ? "required" : ""), make("td", told || ""));
const fields = (schema) => Object.entries(schema.properties || {}).map(([name, of]) =>
  row(name, of, (schema.required || []).includes(name), of.description));
const told = (title, rows) => (rows.length ? [make("h4", title), make("table", "", ...rows)] : []);

function shown(path, verb, route, all) {
  const of = (content) => Object.values(content || {}).slice(0, 1).flatMap(({ schema }) =>
    fields(schema.$ref ? all[schema.$ref.split("/").pop()] : schema));
  const name = Object.assign(make("span", verb.toUpperCase()), { className: "verb" });
  const rows = (route.parameters || []).map((one) => row(one.name, one.schema, one.required, one.description));
  return make("details", "", make("summary", "", name, make("code", path)),
    make("p", route.description || route.summary || ""), ...told("Address", rows),
    ...told("Asked", of((route.requestBody || {}).content)),
    ...told("Answered", of(((route.responses || {})["200"] || {}).content)));
}

fetch("/openapi.json").then((answer) => answer.json()).then((api) => {
  const all = api.components.schemas;
  for (const [path, verbs] of Object.entries(api.paths))
    for (const [verb, route] of Object.entries(verbs)) at("routes").append(shown(path, verb, route, all));
  for (const [name, schema] of Object.entries(all)) {
    const rows = fields(schema), inside = rows.length ? make("table", "", ...rows) : make("p", "", ...kind(schema));
    const shape = make("details", "", make("summary", "", make("code", name)), make("p", schema.description || ""), inside);
    at("shapes").append(Object.assign(shape, { id: name }));
  }
}).catch((error) => { at("routes").append(make("p", `The API's description can't be read: ${error.message}`)); });
