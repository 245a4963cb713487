"A headless Chromium, driven over a pipe (its own protocol, JSON): pages opened, measured, clicked and photographed. Needs no package."
import base64, json, os, shutil, subprocess, tempfile, time
from contextlib import contextmanager
from pathlib import Path

NAMES = 'chromium', 'chromium-browser', 'chromium-headless-shell', 'google-chrome', 'google-chrome-stable', 'chrome', 'headless_shell'

def find_browser():
    "The path of a Chromium: REPQ_BROWSER, or the first on PATH; None where there is none"
    if own := os.environ.get('REPQ_BROWSER'): return own if Path(own).is_file() else None
    return next((p for n in NAMES if (p := shutil.which(n))), None)

class BrowserError(Exception): "What the browser, or a script in a page, said."

class Tab:
    "A page in the browser"
    def __init__(self, process, ends, session=None): self.process, (self.read, self.write), self.session, self.n, self.buffer, self.errors = process, ends, session, 0, b'', []

    def _message(self, until):
        "The next message of the browser"
        import select
        while b'\0' not in self.buffer:
            if not select.select([self.read], [], [], max(until - time.time(), 0))[0]: raise BrowserError('the browser did not answer in time')
            if not (more := os.read(self.read, 2**20)): raise BrowserError('the browser ended')
            self.buffer += more
        text, _, self.buffer = self.buffer.partition(b'\0')
        return json.loads(text)

    def send(self, method, timeout=120, **params):
        "The result of a command"
        self.n += 1
        text = dict(id=self.n, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.write, json.dumps(text).encode() + b'\0')
        until = time.time() + timeout
        while True:
            m = self._message(until)
            if m.get('method') == 'Runtime.exceptionThrown': self.errors.append(_said(m['params']['exceptionDetails']))
            if m.get('method') == 'Runtime.consoleAPICalled' and m['params']['type'] == 'error': self.errors.append(' '.join(str(a.get('value', a.get('description'))) for a in m['params']['args']))
            if m.get('id') != self.n: continue
            if 'error' in m: raise BrowserError(f"{method}: {m['error']['message']}")
            return m['result']

    def js(self, expression, timeout=120):
        "The value of a JavaScript expression; promises are waited for"
        r = self.send('Runtime.evaluate', timeout, expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if 'exceptionDetails' in r: raise BrowserError(_said(r['exceptionDetails']))
        return r['result'].get('value')

    def wait(self, condition, timeout=60):
        "Until a JavaScript condition is true"
        until = time.time() + timeout
        while not (v := self.js(condition)):
            if time.time() > until: raise BrowserError(f'{condition} did not become true in {timeout} s; errors: {self.errors}')
            time.sleep(.05)
        return v

    def size(self, width, height=900, phone=False):
        "The window's size in CSS pixels"
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send('Emulation.setTouchEmulationEnabled', enabled=phone)

    def open(self, url, timeout=60):
        "Go to a page, and wait until it is loaded"
        r = self.send('Page.navigate', url=str(url))
        if r.get('errorText'): raise BrowserError(f"{url}: {r['errorText']}")
        self.wait(f"document.readyState == 'complete' && location.href.startsWith({json.dumps(str(url).split('#')[0])})", timeout)

    def photo(self, path, whole=False):
        "A screenshot as PNG: of the window, or of the whole page"
        Path(path).write_bytes(base64.b64decode(self.send('Page.captureScreenshot', captureBeyondViewport=whole, **self._whole() if whole else {})['data']))

    def _whole(self):
        s = self.send('Page.getLayoutMetrics')['cssContentSize']
        return dict(clip=dict(x=0, y=0, width=s['width'], height=min(s['height'], 12000), scale=1))

    def mouse(self, kind, x, y): self.send('Input.dispatchMouseEvent', type=f'mouse{kind}', x=x, y=y, button='left', buttons=int(kind != 'Released'), clickCount=1)

    def touch(self, kind, *points): self.send('Input.dispatchTouchEvent', type=f'touch{kind}', touchPoints=[dict(x=x, y=y) for x, y in points])

    def key(self, key, text=''):
        for kind in 'keyDown', 'keyUp': self.send('Input.dispatchKeyEvent', type=kind, key=key, code='Space' if key == ' ' else key, **(dict(text=text) if text and kind == 'keyDown' else {}))

    def place(self, selector):
        "(left, top, width, height) of an element, scrolled into view"
        return self.js(f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] }})(document.querySelector({json.dumps(selector)}))")

    def click(self, selector):
        x, y, w, h = self.place(selector)
        for kind in 'Pressed', 'Released': self.mouse(kind, x + w/2, y + h/2)

    def choose(self, selector, path):
        "Put a file into a file input"
        root = self.send('DOM.getDocument')['root']['nodeId']
        self.send('DOM.setFileInputFiles', nodeId=self.send('DOM.querySelector', nodeId=root, selector=selector)['nodeId'], files=[str(path)])

def _said(details): return details.get('exception', {}).get('description') or details['text']

@contextmanager
def browser(path=None):
    "A `Tab` of a headless Chromium that is ended afterwards"
    path = path or find_browser()
    if not path: raise BrowserError('no Chromium is installed (apt install chromium), and REPQ_BROWSER names none')
    there, write = os.pipe()
    read, here = os.pipe()
    def ends():  # the protocol's pipes are 3 and 4
        a, b = os.dup(there), os.dup(here)
        os.dup2(a, 3); os.dup2(b, 4)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars', '--no-first-run', '--disable-extensions', f'--user-data-dir={profile}']
        process = subprocess.Popen([path, *flags, '--remote-debugging-pipe', 'about:blank'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, preexec_fn=ends, pass_fds=(3, 4, there, here))
        os.close(there), os.close(here)
        try:
            tab = Tab(process, (read, write))
            target = tab.send('Target.createTarget', url='about:blank')['targetId']
            tab.session = tab.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
            for domain in 'Page', 'Runtime': tab.send(f'{domain}.enable')
            yield tab
        finally:
            process.terminate()
            try: process.wait(10)
            except subprocess.TimeoutExpired: process.kill(); process.wait()
            os.close(read), os.close(write)
