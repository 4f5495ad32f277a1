"""Schemes in the words of QuantizeML: its parameters, and its JSON layer by layer.

    {"conv1": {"weight_quantizer": {"bitwidth": 8}, "buffer_bitwidth": 28},
     "relu": {"output_quantizer": {"bitwidth": 4, "signed": false,
                                   "axis": "per-tensor", "buffer_bitwidth": 32},
              "buffer_bitwidth": 32}}

``bias_quantizer`` has a ``bitwidth``: a bias of so many bits on steps of its
accumulator (`qjax.affine.fake_quant_bias`). A separable convolution is two layers, or
two weights of one: ``dw_weight_quantizer`` and ``pw_weight_quantizer`` tell them apart
under the name of both. ``scale_bits`` is read and changes nothing: scales are
multipliers of 31 bits here.

Beside the keys of QuantizeML there are some for what it lacks: ``quantizer`` (a string
of `qjax.quantizers.parse`), ``symmetric``, ``narrow_range``, ``power_of_two``,
``calibrator``; they appear where they differ from QuantizeML's ways. ``null`` in place
of a quantizer leaves the values in float.
"""
