// As probe.py, in node: `node probe.mjs FOLDER PACKAGE PREFIX`, see job.mjs. With one thread it is
// the process's CPU time that counts: what else the machine does does not.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import {createRequire} from 'node:module';

const [, , folder, name, prefix] = process.argv;
const probe = JSON.parse(fs.readFileSync(path.join(folder, 'probe.json')));
const require = createRequire(path.join(path.resolve(prefix), 'index.js'));
const version = JSON.parse(
  fs.readFileSync(path.join(prefix, 'node_modules', name, 'package.json'))).version;

function noise(meta) {
  const count = meta.shape.reduce((a, b) => a * b, 1);
  const data = meta.type === 'float32' ? new Float32Array(count)
    : meta.type === 'uint8' ? new Uint8Array(count) : new Int8Array(count);
  for (let i = 0; i < count; i += 1) {
    data[i] = meta.type === 'float32' ? Math.random() * 4 - 2 : Math.random() * 100;
  }
  return [meta.type, data, meta.shape];
}

function milliseconds() {
  if (probe.threads !== 1) return performance.now();
  const {user, system} = process.cpuUsage();
  return (user + system) / 1000;
}

const WARM = 3000;
const median = (times) => times.sort((a, b) => a - b)[Math.floor(times.length / 2)];

try {
  const ort = require(name);
  if (name === 'onnxruntime-web') ort.env.wasm.numThreads = probe.threads;
  const opened = [];
  for (const file of probe.files) {
    const session = await ort.InferenceSession.create(path.join(folder, file), {
      executionProviders: [name === 'onnxruntime-web' ? 'wasm' : 'cpu'],
      graphOptimizationLevel: file.startsWith('whole') ? 'all' : 'disabled',
      intraOpNumThreads: probe.threads, logSeverityLevel: 3,
    });
    const feeds = Object.fromEntries(session.inputMetadata.map((meta) =>
      [meta.name, new ort.Tensor(...noise(meta))]));
    opened.push({session, feeds, times: []});
  }
  const round = async () => {
    for (const {session, feeds, times} of opened) {
      const begun = milliseconds();
      await session.run(feeds);
      times.push(milliseconds() - begun);
    }
  };
  // The engine compiles what is used often once more, beside the first runs and at their cost.
  const warm = milliseconds() + WARM;
  do await round(); while (milliseconds() < warm);
  for (const {times} of opened) times.length = 0;
  for (let i = 0; i < probe.runs; i += 1) await round();
  fs.writeFileSync(path.join(folder, 'result.json'), JSON.stringify({
    ...probe, cpu: os.cpus()[0]?.model ?? process.arch, machine: 'wasm',
    runtime: `${name} ${version}`, ms: opened.map((one) => median(one.times)),
  }));
} catch (error) {
  process.stderr.write(`${String(error.message ?? error).split('\n')[0].slice(0, 300)}\n`);
  process.exit(1);
}
