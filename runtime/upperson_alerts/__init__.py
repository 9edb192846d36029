"""Standing queries: sentences that are compared with every new picture, at a promised rate.

``alerts``      an alert, and how it is added, listed, paused, removed and judged by an operator
``promise``     rates, thresholds, and the test on dismissed alerts
``scoring``     scores of pictures for sentences
``background``  scores of earlier visits, against which a new one is compared
``matcher``     compares rows before they are committed; an extension of ``upperson.matchers``
``replay``      what an alert would have raised
``delivery``    delivers the messages of the outbox
``mqtt``, ``webhook``, ``local``  the deliveries; extensions of ``upperson.deliveries``
"""
