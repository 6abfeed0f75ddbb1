// The page's own functions without a browser: node tests/gateway/page.cjs
const assert = require("node:assert");
const { means, niceTop, markPlaces, Events } = require("../../daemons/gateway/static/app.js");

assert.deepEqual(means([2, 4, 6], 2), [2, 3, 5]);
assert.equal(niceTop(0), 1);
assert.equal(niceTop(3.2), 5);
assert.equal(niceTop(90), 100);
assert.equal(niceTop(0.3), 0.5);

const points = [{ at: 10 }, { at: 20 }, { at: 30 }];
const places = (marks) => markPlaces(points, marks).map((mark) => mark.place);
assert.deepEqual(places([{ at: 5 }, { at: 10 }, { at: 25 }, { at: 99 }]), [0, 2, 3]);
assert.deepEqual(markPlaces([], [{ at: 1 }]), []);

const seen = [];
const events = new Events((state) => seen.push(state.n));
for (const piece of ['data: {"n"', ':1}\n', '\ndata: {"n":2}\n\n: still here\n\nda', 'ta: {"n":3}\n\n']) events.take(piece);
assert.deepEqual(seen, [1, 2, 3]);
console.log("ok");
