"""One step, in the order in which data runs through it.

========================  ==============================================================================================
``settings``              the arguments that the numbers depend on, checked
``two_phase``             the order: what BLUR's methods run, room after room of those below
``under_way``             what a step has until it ends: gradients, parameters, phase; how it ends
``plan``                  what is kept from step to step: flat lists, rows, weights; made anew where something changed
``phases``                where in a step we are: forget, retain, step; every way of getting it wrong, with the remedy
``stash``                 where the forget gradients wait while the retain gradients are computed
``recompute``             instead of waiting: the retain closure evaluated twice
``gradients``             what the phases leave in ``p.grad``, looked at once, taken and paired
``pairs``                 both gradients by parameter, as lists that one kernel call takes
``projection``            pairs to three dots, dots to coefficients, coefficients to the update
``rules``                 the scalar part: (dots, gamma, alpha) to the two weights a and b
``fused``                 the update inside the step of AdamW, Adam or SGD, never written to memory
``base_state``            the base's state as lists, kept from step to step; the step counts as one tensor
``fitting``               whether one loop over memory visits a parameter, its state and its gradients alike
``base``                  any other base optimizer, stepped on the update in ``p.grad``
``metric``                the metric of the retain loss: from dots in it to coefficients
``metric_pairs``          the pairs there, with the base's state; ``metric_update``: the kernels over them
``metric_step``           the order of a step there
``statistics``            what the step saw
``capture``               CUDA graphs: what cannot be captured is refused by name
``dynamo``                the doors at which a step leaves a region that torch.compile compiles
``nothing``               what is said of a step that cannot move anything
========================  ==============================================================================================
"""
