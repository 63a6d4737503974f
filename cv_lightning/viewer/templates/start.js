// Everything starts.
startIntervals();
startCurves();
startCompared();
startExamples();
startGallery();
startLive();
