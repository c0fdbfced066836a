// As onnxruntime_job.py, in node: `node job.mjs FOLDER PACKAGE PREFIX` with PACKAGE
// onnxruntime-web (WebAssembly) or onnxruntime-node, installed below PREFIX.
import fs from 'node:fs';
import path from 'node:path';
import {createRequire} from 'node:module';

const [, , folder, name, prefix] = process.argv;
const at = (file) => path.join(folder, file);
const job = JSON.parse(fs.readFileSync(at('job.json')));
const require = createRequire(path.join(path.resolve(prefix), 'index.js'));
const version = JSON.parse(
  fs.readFileSync(path.join(prefix, 'node_modules', name, 'package.json'))).version;

const ARRAYS = {uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
                int32: Int32Array, int64: BigInt64Array, bool: Uint8Array,
                float32: Float32Array, float64: Float64Array};

function rows(tensor, start, count) {
  const size = tensor.shape.slice(1).reduce((a, b) => a * b, 1);
  const [from, to] = count ? [start * size, Math.min((start + count) * size, tensor.count)]
                           : [0, tensor.count];
  const shape = count ? [(to - from) / size, ...tensor.shape.slice(1)] : tensor.shape;
  return [tensor.data.slice(from, to), shape];
}

try {
  const ort = require(name);
  const web = name === 'onnxruntime-web';
  if (web) ort.env.wasm.numThreads = 1;
  const options = {
    executionProviders: [web ? 'wasm' : 'cpu'],
    graphOptimizationLevel: job.optimize ? 'all' : 'disabled',
    intraOpNumThreads: 1, logSeverityLevel: 3,
  };
  if (!web && job.optimize) options.optimizedModelFilePath = at('optimized.onnx');
  const session = await ort.InferenceSession.create(job.model, options);
  const bytes = new Uint8Array(fs.readFileSync(at('feeds.bin'))).buffer;
  const feeds = job.feeds.map((t) =>
    ({...t, data: new ARRAYS[t.type](bytes, t.offset, t.count)}));
  const feed = (start, count) => Object.fromEntries(feeds.map((t) => {
    const [data, shape] = rows(t, start, count);
    return [t.name, new ort.Tensor(t.type, data, shape)];
  }));
  const parts = session.outputNames.map(() => []);
  const shapes = session.outputNames.map(() => null);
  const types = [];
  for (let start = 0; start < job.rows; start += job.batch || job.rows) {
    const found = await session.run(feed(start, job.batch));
    session.outputNames.forEach((n, i) => {
      const {data, dims, type} = found[n];
      parts[i].push(Buffer.from(data.slice().buffer));
      shapes[i] = shapes[i] ? [shapes[i][0] + dims[0], ...dims.slice(1)] : [...dims];
      types[i] = type;
    });
  }
  const seconds = [];
  for (let i = 0; i < job.runs; i += 1) {
    const one = feed(0, job.one);
    const begun = performance.now();
    await session.run(one);
    seconds.push((performance.now() - begun) / 1000);
  }
  fs.writeFileSync(at('outputs.bin'), Buffer.concat(parts.flat()));
  const outputs = session.outputNames.map((n, i) =>
    ({name: n, type: types[i], shape: shapes[i]}));
  fs.writeFileSync(at('result.json'), JSON.stringify({version, outputs, seconds}));
} catch (error) {
  process.stderr.write(`${String(error.message ?? error).split('\n')[0].slice(0, 300)}\n`);
  process.exit(1);
}
