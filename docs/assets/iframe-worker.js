// Browsers start no worker for a page that is opened as a file. The search then runs in a hidden
// frame that answers as a worker does.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.importScripts = (...urls) =>
        urls.reduce(
          (before, next) => before.then(() => load(new URL(next, url))),
          Promise.resolve(),
        );
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.send = (data) =>
        ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
      const load = (source) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          Object.assign(script, { src: source, onload: resolve, onerror: reject });
          inside.document.body.append(script);
        });
      const ready = load(url);
    }
    postMessage(data) {
      this.send(data);
    }
    terminate() {}
  };
}
