// The question types. Each module has
//   make(context) -> {element, value(), set(value), answered(), key(event), focus()}    the cell where it is answered
//   describe(question, value, letters, t) -> text                                        an answer in words
// `value()` is what the server wants, or undefined while there is none; for a question per response, that response's part.
// `key(event)` is true when the cell has used the key. `context` = {question, responses, response, card, changed, next, t}.

import * as accept from "./accept.js";
import * as compare from "./compare.js";
import * as flags from "./flags.js";
import * as rank from "./rank.js";
import * as rating from "./rating.js";
import * as rewrite from "./rewrite.js";
import * as spans from "./spans.js";
import * as text from "./text.js";

export const TYPES = { accept, compare, flags, rank, rating, rewrite, spans, text };
export const PER_RESPONSE = new Set(["accept", "flags", "rating", "rewrite", "spans"]);
export const ALWAYS_SENT = new Set(["flags", "spans", "rewrite"]); // nothing marked is an answer too
