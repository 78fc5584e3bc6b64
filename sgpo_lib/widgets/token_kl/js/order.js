// Tokens in the order of their forward KL, with the sums that go with it: which tokens a delta masks (Eq. 5), and what
// share of the KL they hold, without looking at the others.

function klOrder(kl) {
  const known = [];
  for (let i = 0; i < kl.length; i++) if (!Number.isNaN(kl[i])) known.push(i);
  const order = Uint32Array.from(known).sort((a, b) => kl[a] - kl[b] || b - a);
  const mass = new Float64Array(order.length + 1);
  for (let r = 0; r < order.length; r++) mass[r + 1] = mass[r] + kl[order[r]];
  const kept = (delta) => {
    // how many tokens have a KL of at most delta: they come first in `order`
    let low = 0, high = order.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (kl[order[middle]] <= delta) low = middle + 1; else high = middle;
    }
    return low;
  };
  const masked = (delta) => {
    const first = kept(delta), total = mass[order.length];
    return {tokens: order.length - first, share: kl.length ? (order.length - first) / kl.length : NaN,
      mass: total > 0 ? (total - mass[first]) / total : 0, unknown: kl.length - order.length};
  };
  const largest = order.length ? kl[order[order.length - 1]] : NaN;
  return {order, kept, masked, largest, mean: order.length ? mass[order.length] / order.length : NaN};
}
