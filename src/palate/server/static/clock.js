// Time spent on an item. The clock stops after IDLE seconds without key, mouse, touch or scroll, and while the page is
// hidden.

export const IDLE = 60;
const SIGNS = ["pointermove", "pointerdown", "keydown", "scroll", "wheel", "input", "focus"];

export class Clock {
  constructor() {
    this.spent = 0;
    this.last = null;
    for (const sign of SIGNS) addEventListener(sign, () => this.tick(), { capture: true, passive: true });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.stop();
      else this.last = Date.now();
    });
  }

  start(spent = 0) {
    this.spent = spent;
    this.last = Date.now();
  }

  tick() {
    if (this.last === null) return;
    const now = Date.now();
    this.spent += Math.max(0, Math.min(IDLE, (now - this.last) / 1000));
    this.last = now;
  }

  stop() {
    this.tick();
    this.last = null;
  }

  seconds() {
    this.tick();
    return Math.round(this.spent * 10) / 10;
  }
}
