// Text as words (also of scripts without spaces), code points, and the difference of two texts by words.

const segmenter = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;

// [{text, start, end, word}]: the whole text in pieces, offsets in code points; `word` is false for space and punctuation.
export function pieces(text) {
  const raw = segmenter
    ? Array.from(segmenter.segment(text), ({ segment, isWordLike }) => [segment, Boolean(isWordLike)])
    : (text.match(/\p{L}[\p{L}\p{M}\p{N}'’]*|\p{N}+|\s+|./gsu) || []).map((part) => [part, /[\p{L}\p{N}]/u.test(part)]);
  let at = 0;
  return raw.map(([part, word]) => {
    const start = at;
    at += Array.from(part).length;
    return { text: part, start, end: at, word };
  });
}

// [{kind: "same" | "out" | "in", text}]: what to take out of `before` and put in to get `after`.
export function difference(before, after) {
  const one = pieces(before).map((piece) => piece.text);
  const two = pieces(after).map((piece) => piece.text);
  let head = 0;
  while (head < one.length && head < two.length && one[head] === two[head]) head += 1;
  let tail = 0;
  while (tail < one.length - head && tail < two.length - head && one.at(-1 - tail) === two.at(-1 - tail)) tail += 1;
  const middle = shortest(one.slice(head, one.length - tail), two.slice(head, two.length - tail));
  const steps = [
    ...one.slice(0, head).map((text) => ["same", text]),
    ...middle,
    ...one.slice(one.length - tail).map((text) => ["same", text]),
  ];
  const joined = [];
  for (const [kind, text] of steps) {
    if (joined.at(-1)?.kind === kind) joined.at(-1).text += text;
    else joined.push({ kind, text });
  }
  return joined;
}

// The same for people: a stretch that was written anew is one thing out and one in, not a mosaic of spaces kept.
export function readable(parts) {
  const found = [];
  const put = (kind, text) => {
    if (!text) return;
    if (found.at(-1)?.kind === kind) found.at(-1).text += text;
    else found.push({ kind, text });
  };
  let [out, into] = ["", ""];
  parts.forEach(({ kind, text }, i) => {
    if (kind === "out") out += text;
    else if (kind === "in") into += text;
    else if (i > 0 && i < parts.length - 1 && !/[\p{L}\p{N}]/u.test(text) && !text.includes("\n")) [out, into] = [out + text, into + text];
    else {
      put("out", out);
      put("in", into);
      [out, into] = ["", ""];
      put("same", text);
    }
  });
  put("out", out);
  put("in", into);
  return found;
}

const MOST_STEPS = 800; // beyond that the texts have little in common, and all of one is replaced by all of the other

// Myers 1986: the shortest script of single insertions and deletions, greedy by diagonals.
function shortest(one, two) {
  const replaced = () => [...one.map((text) => ["out", text]), ...two.map((text) => ["in", text])];
  if (!one.length || !two.length) return replaced();
  const most = Math.min(one.length + two.length, MOST_STEPS);
  const reach = new Map([[1, 0]]);
  const trace = [];
  for (let steps = 0; steps <= most; steps += 1) {
    trace.push(new Map(reach));
    for (let k = -steps; k <= steps; k += 2) {
      const down = k === -steps || (k !== steps && reach.get(k - 1) < reach.get(k + 1));
      let x = down ? reach.get(k + 1) : reach.get(k - 1) + 1;
      while (x < one.length && x - k < two.length && one[x] === two[x - k]) x += 1;
      reach.set(k, x);
      if (x >= one.length && x - k >= two.length) return walk(one, two, trace);
    }
  }
  return replaced();
}

function walk(one, two, trace) {
  const script = [];
  let x = one.length;
  let y = two.length;
  for (let steps = trace.length - 1; steps >= 0; steps -= 1) {
    const reach = trace[steps];
    const k = x - y;
    const down = k === -steps || (k !== steps && reach.get(k - 1) < reach.get(k + 1));
    const from = down ? k + 1 : k - 1;
    const startX = reach.get(from);
    const startY = startX - from;
    while (x > startX && y > startY && x > 0 && y > 0) {
      script.push(["same", one[x - 1]]);
      x -= 1;
      y -= 1;
    }
    if (steps === 0) break;
    if (down) script.push(["in", two[(y -= 1)]]);
    else script.push(["out", one[(x -= 1)]]);
  }
  return script.reverse();
}
