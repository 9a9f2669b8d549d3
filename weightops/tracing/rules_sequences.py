"""Rules of attention and recurrent layers."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from weightops.tracing.labels import Axis
from weightops.tracing.rules import Axes, Stack, Value, broadcast, replace, rule
from weightops.tracing.walk import Walk


@rule("scaled_dot_product_attention")
def _attention(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Scores over queries and keys, which permute too unless a mask tells positions apart."""
    labels = walk.labels
    query, key, value = map(walk.axes, (args.query, args.key, args.value))
    if args.enable_gqa:
        heads, shared = walk.shape(args.query)[-3], walk.shape(args.key)[-3]
        repeat = labels.free(heads // shared)
        key, value = replace(key, -3, key[-3] + repeat), replace(value, -3, value[-3] + repeat)
    labels.unite(query[-1], key[-1])
    labels.unite(key[-2], value[-2])
    lead = broadcast(walk, len(query) - 2, [query[:-2], key[:-2], value[:-2]])
    scores = (*lead, query[-2], key[-2])
    if args.is_causal:
        for axis in scores[-2:]:
            labels.fix(axis, "a causal mask")
    if args.attn_mask is not None:
        scores = broadcast(walk, len(scores), [scores, walk.axes(args.attn_mask)])
    return (*scores[:-1], value[-1])


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def _recurrent(walk: Walk, node: fx.Node, args: SimpleNamespace) -> Value:
    """Gates are a product ``(None, h)``; what is fed back carries the hidden label again."""
    labels, name = walk.labels, walk.name(node)
    states = args.hx if name == "lstm" else [args.hx]
    directions = 2 if args.bidirectional else 1
    cells = args.num_layers * directions
    per_cell = len(args.params) // cells
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    x = walk.axes(args.input)
    initial = [walk.axes(state) for state in states]
    feature, hidden, memory = x[-1], [], []
    for layer in range(args.num_layers):
        outputs = []
        for cell in range(layer * directions, (layer + 1) * directions):
            params = args.params[cell * per_cell : (cell + 1) * per_cell]
            w_in, w_hidden = walk.axes(params[0]), walk.axes(params[1])
            unit = labels.new(walk.shape(params[0])[0] // gates)
            out = unit
            projected = per_cell in (3, 5)
            biases = params[2 : 2 + 2 * args.has_biases]
            for each in (params[0], params[1], *biases):
                gate = labels.fixed(gates, "gates")
                labels.unite(walk.axes(each)[0], gate + unit)
            if projected:
                projection = walk.axes(params[-1])
                labels.unite(projection[1], unit)
                out = projection[0]
            labels.unite(w_in[1], feature)
            labels.unite(w_hidden[1], out)
            labels.unite(initial[0][-1], out)
            if len(initial) > 1:
                labels.unite(initial[1][-1], unit)
            outputs.append(out)
            hidden.append(out)
            memory.append(unit)
        feature = labels.join(outputs)
    batch = x[0 if args.batch_first else 1]
    time = x[1 if args.batch_first else 0]
    labels.fix(time, "time")

    def stacked(units: list[Axis]) -> Axes | Stack:
        parts = tuple(((), batch, unit) for unit in units)
        return parts[0] if len(parts) == 1 else Stack(0, parts)

    states_out = [stacked(hidden), *([stacked(memory)] if name == "lstm" else [])]
    return [(*x[:-1], feature), *states_out]
