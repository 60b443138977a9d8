"""Stage 2: render the labelled views again, and train and evaluate a student on the stored labels. No teacher is loaded.

`loop` uses the other modules in this order:

    run           open the data, build the student, resume
    order         choose the views of each update
    stream        render these views in loader processes, and read their labels
    student       compute the answers of both heads
    losses        compare the answers with the class labels and the teacher's labels
    optim         set the learning rate, update the weights and their moving average
    evaluate      measure the accuracy of both heads and their fusions
    checkpoint    save the state of the run
    export        write the student as a folder that timm loads
"""
