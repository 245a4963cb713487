// The part of a page in which the visitor's browser computes repq's integer networks, with onnxruntime-web's WebAssembly.
// Everything comes as scripts beside this one, so that it works from a file as from a server: networks.js, ort.js, runtime.js (page.py writes them).
(() => {
'use strict'
const here = document.currentScript.src.replace(/[^/]*$/, ''), root = document.getElementById('repq-run')
const RADIUS = 2.9      // of the pen, in the 32×32 pixels that the digits of the data were scanned to: as much ink as they have
const LARGEST = 256     // pixels of a picture's longer side
const say = (where, text) => { root.querySelector(where).textContent = text }
const bytes = n => n.toLocaleString('en') + ' B'

root.innerHTML = `
<h2 id="a-digit" class="anchored">A digit</h2>
<div class="rq-cards">
  <div class="rq-card">
    <canvas class="pad" width="280" height="280" tabindex="0" role="img" aria-describedby="pad-help" aria-label="Drawing area for a digit"></canvas>
    <p id="pad-help">Draw a digit with mouse, finger or pen (a 7 with its bar: those of the data have one). With the keyboard: arrow keys move the pen, space puts it down or lifts it, Delete clears.</p>
    <div class="rq-row"><button type="button" class="clear">Clear</button></div>
    <div class="rq-row pick" role="group" aria-label="Digits that the networks were not trained on"></div>
  </div>
  <div class="rq-card">
    <div class="rq-row"><canvas class="seen" width="8" height="8" role="img" aria-label="What the networks see: 8 by 8 pixels of 17 greys"></canvas><span>what the networks see: 8 × 8 pixels</span></div>
    <div class="wide"><table><caption>Answers, computed here in integers</caption>
      <thead><tr><th scope="col">weights</th><th scope="col">answer</th><th scope="col">time</th><th scope="col">network</th><th scope="col">ONNX file</th><th scope="col">sure</th></tr></thead>
      <tbody aria-live="polite"></tbody></table></div>
    <p class="status digits-status" role="status"></p>
  </div>
</div>
<h2 id="a-picture" class="anchored">A picture, twice as large</h2>
<div class="rq-row">
  <label>Your picture, which stays on this device: <input type="file" class="photo" accept="image/*"></label>
  <button type="button" class="sample">Take the cat</button>
  <fieldset><legend>bits of the weights</legend></fieldset>
</div>
<p class="status photo-status" role="status"></p>
<div class="rq-cards">
  <figure><canvas class="smooth" width="256" height="256" role="img" aria-label="The picture as the browser enlarges it"></canvas><figcaption>as the browser enlarges it</figcaption></figure>
  <figure><canvas class="sharp" width="256" height="256" role="img" aria-label="The picture as the network enlarges it"></canvas><figcaption>as the network does</figcaption></figure>
</div>`
const link = document.createElement('link')
link.rel = 'stylesheet'; link.href = here + 'app.css'; document.head.append(link)

// scripts and sessions, fetched when they are first needed
const loaded = {}
const script = name => loaded[name] ??= new Promise((done, failed) => {
  const s = document.createElement('script')
  s.src = here + name; s.onload = done; s.onerror = () => failed(new Error(`${name} could not be loaded`)); document.head.append(s)
})
const raw = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))
const unzip = async text => new Response(new Blob([raw(text)]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer()

const runtime = () => loaded.runtime_ ??= (async () => {
  await script('ort.js'); await script('runtime.js')
  if (!window.REPQ_RUNTIME) throw new Error('this site was built without onnxruntime-web, so nothing can be computed here')
  const mjs = new Blob([await unzip(REPQ_RUNTIME.mjs)], {type: 'text/javascript'})
  ort.env.wasm.numThreads = 1
  ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(mjs)}
  ort.env.wasm.wasmBinary = await unzip(REPQ_RUNTIME.wasm)
  ort.env.logLevel = 'error'
})()

const row = (kind, bits) => REPQ_NETWORKS.networks.find(r => r.kind === kind && r.bits === bits)
const session = (kind, bits) => loaded[kind + bits] ??= runtime().then(() => ort.InferenceSession.create(raw(row(kind, bits).onnx), {executionProviders: ['wasm']}))

async function compute(kind, bits, x, shape) {
  const s = await session(kind, bits), feed = {[s.inputNames[0]]: new ort.Tensor('float32', x, shape)}
  const start = performance.now(), y = (await s.run(feed))[s.outputNames[0]]
  return {y: y.data, dims: y.dims, ms: performance.now() - start}
}

// one thing after another: a session runs one image at a time, and of what waits only the newest is wanted
function newest(work, failed) {
  let busy = false, next = null
  return async function run(...args) {
    if (busy) { next = args; return }
    busy = true
    try { await work(...args) } catch (e) { failed(e) }
    busy = false
    if (next) { const a = next; next = null; run(...a) }
  }
}

// the digit
const pad = root.querySelector('.pad'), ink = pad.getContext('2d'), seen = root.querySelector('.seen').getContext('2d')
let strokes = [], pen = null, cursor = {x: 140, y: 140, down: false}

function draw() {
  ink.fillStyle = '#fff'; ink.fillRect(0, 0, 280, 280)
  lines(ink, strokes, p => p, 20)
  if (document.activeElement === pad && cursor.shown) {
    ink.strokeStyle = cursor.down ? '#c00' : '#2780e3'; ink.lineWidth = 3
    ink.beginPath(); ink.arc(cursor.x, cursor.y, 12, 0, 7); ink.stroke()
  }
}

function lines(c, strokes, to, width) {
  c.strokeStyle = c.fillStyle = '#000'; c.lineWidth = width; c.lineCap = c.lineJoin = 'round'
  for (const s of strokes) {
    c.beginPath()
    s.forEach((p, i) => { const q = to(p); i ? c.lineTo(q.x, q.y) : c.moveTo(q.x, q.y) })
    if (s.length === 1) { const q = to(s[0]); c.lineTo(q.x + .01, q.y) }
    c.stroke()
  }
}

// As the data was made: the digit fills 32 pixels of height and stands in the middle; of each 4×4 pixels the inked ones are counted.
function pixels() {
  const all = strokes.flat(), xs = all.map(p => p.x), ys = all.map(p => p.y)
  const left = Math.min(...xs), right = Math.max(...xs), top = Math.min(...ys), bottom = Math.max(...ys)
  const room = 32 - 2*RADIUS, scale = Math.min(room/Math.max(bottom - top, 30), (25 - 2*RADIUS)/Math.max(right - left, 1)), stretch = Math.min(room/Math.max(bottom - top, 1)/scale, 1.6)
  const c = new OffscreenCanvas(256, 256).getContext('2d', {willReadFrequently: true})
  c.fillStyle = '#fff'; c.fillRect(0, 0, 256, 256)
  lines(c, strokes, p => ({x: 8*(16 + (p.x - (left + right)/2)*scale), y: 8*(16 + (p.y - (top + bottom)/2)*scale*(bottom - top > 30 ? stretch : 1))}), 16*RADIUS)
  const data = c.getImageData(0, 0, 256, 256).data, sums = new Array(64).fill(0)
  for (let y = 0; y < 256; y++) for (let x = 0; x < 256; x++) sums[8*(y >> 5) + (x >> 5)] += 255 - data[4*(256*y + x)]
  return sums.map(s => Math.round(16*s/(255*1024)))
}

function show(context, greys) {
  const image = context.createImageData(8, 8)
  greys.forEach((g, i) => { const v = Math.round(255*(1 - g/16)); image.data.set([v, v, v, 255], 4*i) })
  context.putImageData(image, 0, 0)
}

const answer = newest(async greys => {
  say('.digits-status', window.REPQ_RUNTIME ? 'computing …' : 'loading the runtime, 5 MB …')
  await script('networks.js')
  const x = Float32Array.from(greys, g => REPQ_NETWORKS.levels[g]), body = root.querySelector('tbody'), rows = []
  for (const {bits} of REPQ_NETWORKS.networks.filter(r => r.kind === 'digits')) {
    await compute('digits', bits, x, [1, 1, 8, 8])                        // warms up
    rows.push([bits, await compute('digits', bits, x, [1, 1, 8, 8])])
  }
  body.replaceChildren(...rows.map(([bits, {y, ms}]) => {
    const best = y.indexOf(Math.max(...y)), sure = 1/y.reduce((s, v) => s + Math.exp(v - y[best]), 0), r = row('digits', bits), tr = document.createElement('tr')
    tr.dataset.bits = bits; tr.dataset.scores = JSON.stringify(Array.from(y))
    tr.innerHTML = `<th scope="row">${bits} bits</th><td class="answer">${best}</td><td>${ms.toFixed(1)} ms</td><td>${bytes(r.bytes)}</td><td>${bytes(r.onnx_bytes)}</td><td>${Math.round(100*sure)} %</td>`
    return tr
  }))
  body.dataset.greys = JSON.stringify(greys)
  say('.digits-status', '')
}, e => say('.digits-status', `That did not work: ${e.message}`))

function look(greys) { show(seen, greys); answer(greys) }
function drawn() { draw(); if (strokes.length) look(pixels()) }
function clear() {
  strokes = []; pen = null; cursor.down = false
  draw(); seen.clearRect(0, 0, 8, 8); root.querySelector('tbody').replaceChildren()
  delete root.querySelector('tbody').dataset.greys
}

const at = e => { const r = pad.getBoundingClientRect(); return {x: (e.clientX - r.left)*280/r.width, y: (e.clientY - r.top)*280/r.height} }
pad.addEventListener('pointerdown', e => {
  if (e.button) return
  e.preventDefault(); pad.focus({preventScroll: true}); pad.setPointerCapture(e.pointerId)
  cursor.shown = false; pen = e.pointerId; strokes.push([at(e)]); draw()
})
pad.addEventListener('pointermove', e => {
  if (e.pointerId !== pen) return
  for (const p of e.getCoalescedEvents?.().length ? e.getCoalescedEvents() : [e]) strokes.at(-1).push(at(p))
  draw()
})
for (const end of ['pointerup', 'pointercancel']) pad.addEventListener(end, e => { if (e.pointerId === pen) { pen = null; drawn() } })

const MOVES = {ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10]}
pad.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return
  const m = MOVES[e.key]
  if (m) {
    cursor.x = Math.min(270, Math.max(10, cursor.x + m[0])); cursor.y = Math.min(270, Math.max(10, cursor.y + m[1]))
    if (cursor.down) strokes.at(-1).push({x: cursor.x, y: cursor.y})
  } else if (e.key === ' ') {
    cursor.down = !cursor.down
    if (cursor.down) strokes.push([{x: cursor.x, y: cursor.y}])
  } else if (e.key === 'Delete' || e.key === 'Backspace' || e.key === 'Escape') { e.preventDefault(); clear(); return }
  else return
  e.preventDefault(); cursor.shown = true
  e.key === ' ' && !cursor.down ? drawn() : draw()
})
pad.addEventListener('focus', () => { cursor.shown = pen === null && pad.matches(':focus-visible'); draw() })
pad.addEventListener('blur', () => { cursor.down = false; draw() })
root.querySelector('.clear').addEventListener('click', clear)

// the picture
let picture = null
const grid = (w, h) => new OffscreenCanvas(w, h).getContext('2d', {willReadFrequently: true})
const luminance = (d, i) => 16 + (65.481*d[i] + 128.553*d[i + 1] + 24.966*d[i + 2])/255    // BT.601, as the networks were trained

const enlarge = newest(async bits => {
  const {width: w, height: h} = picture, small = grid(w, h), large = grid(2*w, 2*h)
  say('.photo-status', window.REPQ_RUNTIME ? 'computing …' : 'loading the runtime, 5 MB …')
  await script('networks.js')
  small.fillStyle = '#fff'; small.fillRect(0, 0, w, h); small.drawImage(picture, 0, 0)
  large.imageSmoothingQuality = 'high'; large.drawImage(small.canvas, 0, 0, 2*w, 2*h)
  const d = small.getImageData(0, 0, w, h).data, image = large.getImageData(0, 0, 2*w, 2*h), out = image.data
  put('.smooth', large.canvas)
  const x = Float32Array.from({length: w*h}, (_, i) => luminance(d, 4*i))
  await session('photos', bits)
  await new Promise(r => setTimeout(r))                                   // shows what was said
  const {y, ms} = await compute('photos', bits, x, [1, 1, h, w])
  for (let i = 0; i < y.length; i++) {                                    // another luminance, the same colours
    const more = 255/219*(y[i] - luminance(out, 4*i))
    for (let k = 0; k < 3; k++) out[4*i + k] += more
  }
  large.putImageData(image, 0, 0)
  put('.sharp', large.canvas)
  window.repqLast = {bits, x, y, width: w, height: h}
  const r = row('photos', bits)
  say('.photo-status', `${w} × ${h} to ${2*w} × ${2*h} pixels by the ${bits}-bit network of ${bytes(r.bytes)} (ONNX file ${bytes(r.onnx_bytes)}): ${ms.toFixed(0)} ms`)
}, e => say('.photo-status', `That did not work: ${e.message}`))

function put(where, canvas) {
  const c = root.querySelector(where)
  c.width = canvas.width; c.height = canvas.height; c.getContext('2d').drawImage(canvas, 0, 0)
}

const bitsChosen = () => +root.querySelector('input[name=bits]:checked').value
async function take(source) {
  try {
    const bitmap = await createImageBitmap(source), scale = Math.min(1, LARGEST/Math.max(bitmap.width, bitmap.height))
    const size = {resizeWidth: Math.max(8, Math.round(bitmap.width*scale)), resizeHeight: Math.max(8, Math.round(bitmap.height*scale)), resizeQuality: 'high'}
    picture = scale < 1 || Math.min(bitmap.width, bitmap.height) < 8 ? await createImageBitmap(bitmap, size) : bitmap
  } catch (e) { say('.photo-status', 'This file is no picture that your browser can read.'); return }
  enlarge(bitsChosen())
}
root.querySelector('.photo').addEventListener('change', e => { if (e.target.files[0]) take(e.target.files[0]) })
root.querySelector('.sample').addEventListener('click', async () => {
  await script('networks.js')
  take(new Blob([raw(REPQ_NETWORKS.photo.split(',')[1])], {type: 'image/png'}))
})
root.querySelector('fieldset').insertAdjacentHTML('beforeend', [8, 4, 2].map(b => `<label><input type="radio" name="bits" value="${b}"${b === 8 ? ' checked' : ''}> ${b}</label>`).join(''))
root.querySelector('fieldset').addEventListener('change', () => { if (picture) enlarge(bitsChosen()) })

// digits to pick
draw()
script('networks.js').then(() => root.querySelector('.pick').append(...REPQ_NETWORKS.examples.map((greys, n) => {
  const b = document.createElement('button'), c = document.createElement('canvas')
  b.type = 'button'; b.className = 'digit'; b.setAttribute('aria-label', `A ${n}`); b.title = `A ${n}`; b.dataset.digit = n
  c.width = c.height = 8; show(c.getContext('2d'), greys); b.append(c)
  b.addEventListener('click', () => { clear(); look(greys) })
  return b
})), e => say('.digits-status', e.message))
})()
