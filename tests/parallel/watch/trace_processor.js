// Perfetto's own trace processor, the one that its UI runs, asked about a trace:
//     node trace_processor.js UI TRACE < queries > answers
// UI: the folder of a Perfetto UI (engine_bundle.js and trace_processor*.wasm). Queries: a JSON list of SQL; answers: a JSON
// list of lists of rows. The bundle is a web worker: what it needs of a browser stands here. Messages are protobuf, as in
// perfetto's trace_processor.proto: TraceProcessorRpc.

const fs = require("fs");
const path = require("path");
const vm = require("vm");

const node = process;
const [folder, trace] = node.argv.slice(2);

// --- a browser's worker, as far as the bundle looks

class XMLHttpRequest {
  open(_, name) { this.file = path.join(folder, path.basename(name)); }
  send() { this.response = fs.readFileSync(this.file); }
}
const quiet = () => {};
const self = { location: { href: "file:///engine_bundle.js" } };
Object.assign(globalThis, { self, location: self.location, XMLHttpRequest, importScripts: quiet, WorkerGlobalScope: class {} });
Object.assign(console, { log: quiet, warn: quiet, error: quiet });
// The bundle refuses to run where it finds node.
globalThis.process = undefined;
vm.runInThisContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"));

// --- protobuf

function varint(n) {
  const bytes = [];
  for (n = BigInt(n); n > 127n; n >>= 7n) bytes.push(Number(n & 127n) | 128);
  return Buffer.from([...bytes, Number(n)]);
}
const number = (id, n) => Buffer.concat([varint(id << 3), varint(n)]);
const bytes = (id, value) => Buffer.concat([varint((id << 3) | 2), varint(value.length), value]);

function reader(buffer) {
  let at = 0;
  const next = () => {
    let n = 0n, shift = 0n, byte;
    do { byte = buffer[at++]; n |= BigInt(byte & 127) << shift; shift += 7n; } while (byte & 128);
    return n;
  };
  const take = n => buffer.subarray(at, (at += n));
  return { next, take, more: () => at < buffer.length };
}

function* fields(buffer) {
  const r = reader(buffer);
  while (r.more()) {
    const key = Number(r.next()), kind = key & 7;
    if (kind === 0) yield [key >> 3, r.next()];
    else if (kind === 1) yield [key >> 3, r.take(8)];
    else if (kind === 2) yield [key >> 3, r.take(Number(r.next()))];
    else throw new Error(`wire type ${kind}`);
  }
}

function packed(buffer) {
  const r = reader(buffer), found = [];
  while (r.more()) found.push(Number(BigInt.asIntN(64, r.next())));
  return found;
}

// --- questions and answers

let answers = [];
const port = { postMessage: reply => { for (const [, message] of fields(Buffer.from(reply))) answers.push(message); } };
let sent = 0;
function ask(request, ...rest) {
  answers = [];
  const rpc = Buffer.concat([number(1, sent++), number(2, request), ...rest]);
  port.onmessage({ data: new Uint8Array(bytes(1, rpc)) });
}

// Of QueryResult.CellsBatch: types of cells (1 null, 2 whole number, 3 float, 4 text), then the values by type.
function cells(batch) {
  let kinds = [], whole = [], floats = [], text = [];
  for (const [id, value] of fields(batch)) {
    if (id === 1) kinds = packed(value);
    if (id === 2) whole = packed(value);
    if (id === 3) for (let i = 0; i < value.length; i += 8) floats.push(value.readDoubleLE(i));
    if (id === 5) text = value.toString().split("\0");
  }
  return kinds.map(k => (k === 2 ? whole.shift() : k === 3 ? floats.shift() : k === 4 ? text.shift() : null));
}

function query(sql) {
  ask(3, bytes(103, bytes(1, Buffer.from(sql))));
  const columns = [], values = [];
  for (const message of answers)
    for (const [id, result] of fields(message))
      if (id === 203)
        for (const [part, value] of fields(result)) {
          if (part === 1) columns.push(value.toString());
          if (part === 2) throw new Error(`${sql}: ${value}`);
          if (part === 3) values.push(...cells(value));
        }
  const rows = [];
  while (values.length) rows.push(Object.fromEntries(columns.map(c => [c, values.shift()])));
  return rows;
}

// What the bundle has begun is through before the first timer.
setTimeout(() => {
  self.onmessage({ data: port });
  ask(1, bytes(101, fs.readFileSync(trace)));
  ask(2);
  const found = JSON.parse(fs.readFileSync(0, "utf8")).map(query);
  fs.writeSync(1, JSON.stringify(found));
  node.exit(0);
}, 0);
