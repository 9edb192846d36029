"""Read the shape of a uint8 input behind its Cast."""

import onnx_ir as ir


class ShapeAfterCast(ir.passes.InPlacePass):
    """Let Shape nodes read the Cast of an 8-bit graph input instead of the input itself.

    TensorRT takes uint8 at the border of a network only: nothing but a Cast may read it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewire in place."""
        modified = False
        for value in model.graph.inputs:
            casts = [node for node in value.consumers() if node.op_type == "Cast"]
            if value.dtype != ir.DataType.UINT8 or not casts:
                continue
            for node in [node for node in value.consumers() if node.op_type == "Shape"]:
                node.replace_input_with(0, casts[0].outputs[0])
                modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)
